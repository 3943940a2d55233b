"""Tiny random highways and the plain transformers models they grow from: 16 x 16 pixels, 6 blocks, 5 labels."""

import torch
from torch import nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitModel,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaForImageClassification,
    IJepaModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipVisionModel,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    ViTMSNConfig,
    ViTMSNForImageClassification,
    ViTMSNModel,
)

from lgvit_hf import (
    BeitHighway,
    CLIPHighway,
    DeiTHighway,
    Dinov2Highway,
    Dinov2WithRegistersHighway,
    Dinov3ViTHighway,
    IJepaHighway,
    SiglipHighway,
    SwinHighway,
    ViTHighway,
    ViTMSNHighway,
)
from tests.seeds import generator, seeded

# what most tests are run on, and what only those are that ask about a backbone
KINDS = ("vit", "deit", "deit_plain", "swin")
OTHER_KINDS = ("dinov2", "dinov2_with_registers", "dinov3_vit", "siglip", "clip", "beit", "vit_msn", "ijepa")
MODELS = {
    "vit": ViTHighway,
    "deit": DeiTHighway,
    "deit_plain": DeiTHighway,
    "swin": SwinHighway,
    "dinov2": Dinov2Highway,
    "dinov2_with_registers": Dinov2WithRegistersHighway,
    "dinov3_vit": Dinov3ViTHighway,
    "siglip": SiglipHighway,
    "clip": CLIPHighway,
    "beit": BeitHighway,
    "vit_msn": ViTMSNHighway,
    "ijepa": IJepaHighway,
}
CONFIGS = {kind: model.config_class for kind, model in MODELS.items()}
NATIVES = {
    "vit": (ViTForImageClassification, ViTModel, ViTConfig),
    "deit": (DeiTForImageClassificationWithTeacher, DeiTModel, DeiTConfig),
    "deit_plain": (DeiTForImageClassification, DeiTModel, DeiTConfig),
    "swin": (SwinForImageClassification, SwinModel, SwinConfig),
    "dinov2": (Dinov2ForImageClassification, Dinov2Model, Dinov2Config),
    "dinov2_with_registers": (
        Dinov2WithRegistersForImageClassification,
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig,
    ),
    # there is no classifier
    "dinov3_vit": (DINOv3ViTModel, DINOv3ViTModel, DINOv3ViTConfig),
    "siglip": (SiglipForImageClassification, SiglipVisionModel, SiglipConfig),
    "clip": (CLIPForImageClassification, CLIPVisionModel, CLIPConfig),
    "beit": (BeitForImageClassification, BeitModel, BeitConfig),
    "vit_msn": (ViTMSNForImageClassification, ViTMSNModel, ViTMSNConfig),
    "ijepa": (IJepaForImageClassification, IJepaModel, IJepaConfig),
}

MORE = {
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2, "num_register_tokens": 3},
    "dinov3_vit": {"num_register_tokens": 3},
    "beit": {"use_relative_position_bias": True},
}
NUM_BLOCKS, NUM_LABELS, IMAGE_SIZE = 6, 5, 16
LOCAL_HEADS = ("conv1_1", "conv2_1", "conv_normal", "mlp")
GLOBAL_HEADS = ("attention_r1", "attention_r2", "attention_r3", "self_attention")
HEADS = ("linear", "vit", *LOCAL_HEADS, *GLOBAL_HEADS)


def tiny_backbone_settings(kind):
    """The fields of upstream's config. ViT and DeiT: a 4 x 4 grid. Swin: 8 x 8, 4 x 4 and 2 x 2, ever wider."""
    settings = {"image_size": IMAGE_SIZE, "num_labels": NUM_LABELS}
    if kind == "swin":
        swin = {"patch_size": 2, "embed_dim": 16, "depths": [2, 2, 2], "num_heads": [2, 2, 4], "window_size": 2}
        return {**settings, **swin, "mlp_ratio": 2.0}
    sizes = {"hidden_size": 32, "num_hidden_layers": NUM_BLOCKS, "num_attention_heads": 4, "intermediate_size": 64}
    return {**settings, **sizes, "patch_size": 4, **MORE.get(kind, {})}


def tiny_config(kind, **changes):
    """A highway's config; by default four exits, behind blocks 2 to 5, with LGViT's heads."""
    settings = tiny_backbone_settings(kind)
    if kind.startswith("deit"):
        settings["distilled"] = kind == "deit"
    return CONFIGS[kind](**{**settings, **changes})


def tiny_model(kind, seed=0, **changes):
    """A highway in `eval()` mode whose every weight and batch statistic is random."""
    seeded(seed)
    return scrambled(MODELS[kind](tiny_config(kind, **changes)))


def tiny_native(kind, seed=0, bare=False, **changes):
    """The plain transformers classifier (or the `bare` backbone inside it) in `eval()` mode."""
    seeded(seed)
    classifier, backbone, config_class = NATIVES[kind]
    settings = {**tiny_backbone_settings(kind), **changes}
    if "vision_config" in getattr(config_class, "sub_configs", ()):
        config = config_class(num_labels=settings.pop("num_labels"), vision_config=settings)
        config = config.vision_config if bare else config
    else:
        config = config_class(**settings)
    return scrambled((backbone if bare else classifier)(config))


def tiny_images(num_images, size=IMAGE_SIZE, seed=0):
    """Random pixels `[B, 3, H, W]` under a random colour each, so that no two images are alike."""
    height, width = (size, size) if isinstance(size, int) else size
    numbers = generator(seed)
    colour = 2 * torch.randn(num_images, 3, 1, 1, generator=numbers)
    return colour + torch.randn(num_images, 3, height, width, generator=numbers)


def tiny_dataset(num_images, seed=0):
    """A list of rows as `Trainer` takes them."""
    pixels = tiny_images(num_images, seed=seed)
    return [{"pixel_values": image, "labels": index % NUM_LABELS} for index, image in enumerate(pixels)]


@torch.no_grad()
def scrambled(model):
    """Weights far from their small, symmetric start, so that exits disagree and nothing cancels; `eval()` mode."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.normal_(0.0, parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.2)
            if name == "weight" and parameter.dim() == 1:
                parameter.add_(1.0)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()

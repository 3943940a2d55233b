"""Golden logits of timm's and torchvision's own models, tiny and random: `python make.py` beside both libraries.

Made with timm 1.0.31 and torchvision 0.29.2 on torch 2.13.0; neither is needed to run the tests. torchvision is only
imported for its model definitions: where its compiled operators do not load, names that nothing here calls stand in.
"""

import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent


def import_libraries():
    for name in ("_meta_registrations", "_autograd_registrations"):
        sys.modules[f"torchvision.{name}"] = types.ModuleType(f"torchvision.{name}")
    import timm
    from torchvision.models.swin_transformer import SwinTransformer
    from torchvision.models.vision_transformer import VisionTransformer

    return timm, VisionTransformer, SwinTransformer


def models():
    timm, tv_vit, tv_swin = import_libraries()
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import VisionTransformer

    vit = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 2,
        "num_classes": 5,
    }
    swin = {"patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4, "mlp_ratio": 2.0}
    tv = {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    print("timm", timm.__version__)
    yield "timm_vit", VisionTransformer(**vit), 16
    yield "timm_vit_no_qkv_bias", VisionTransformer(**{**vit, "img_size": (16, 24), "qkv_bias": False}), (16, 24)
    yield "timm_deit_distilled", VisionTransformerDistilled(**vit), 16
    yield "timm_swin", SwinTransformer(**swin, img_size=32, num_classes=5), 32
    yield "torchvision_vit", tv_vit(**tv, num_classes=5), 16
    tv_swin_sizes = {**swin, "patch_size": [2, 2], "window_size": [4, 4]}
    yield "torchvision_swin", tv_swin(**tv_swin_sizes, num_classes=5), 32


@torch.no_grad()
def scramble(model):
    """Weights far from their start, where much is zero or one; small variances, so that the norms' eps matters."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.normal_(0.0, parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.2)
            if name == "weight" and parameter.dim() == 1:
                parameter.add_(1.0)
    for name, parameter in model.named_parameters():
        # of the size of the norms' eps are then the variances in the first block
        if name.startswith(("patch_embed.proj", "conv_proj", "features.0.0", "cls_token", "class_token")):
            parameter.mul_(2e-3)
        if name in ("pos_embed", "encoder.pos_embedding", "dist_token"):
            parameter.mul_(2e-3)
        if name.endswith(("relative_position_bias_table",)):
            parameter.mul_(4.0)
    return model.eval()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for seed, (name, model, size) in enumerate(models()):
        torch.manual_seed(seed)
        height, width = (size, size) if isinstance(size, int) else size
        scramble(model)
        images = torch.randn(3, 3, height, width)
        with torch.no_grad():
            logits = model(images)
        state = {f"param.{key}": tensor.clone() for key, tensor in model.state_dict().items()}
        save_file({**state, "input": images, "logits": logits}, HERE / f"{name}.safetensors")
        print(name, len(state), logits.std().item())

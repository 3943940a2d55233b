"""`ModelTesterMixin` on every model: upstream's own as the reference, and ours."""

import tempfile
from unittest import TestCase

import pytest
import torch
from torch import nn
from transformers import (
    BeitForImageClassification,
    BeitModel,
    CLIPForImageClassification,
    DeiTForImageClassification,
    DeiTModel,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    IJepaForImageClassification,
    IJepaModel,
    SiglipForImageClassification,
    SwinForImageClassification,
    SwinModel,
    ViTForImageClassification,
    ViTModel,
    ViTMSNForImageClassification,
    ViTMSNModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor

from lgvit_hf import (
    AViT,
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

HIGHWAYS = (
    *(ViTHighway, DeiTHighway, SwinHighway, Dinov2Highway, Dinov2WithRegistersHighway, Dinov3ViTHighway),
    *(SiglipHighway, CLIPHighway, BeitHighway, ViTMSNHighway, IJepaHighway),
)
# by these names the tests know who takes labels
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.update(
    (model.config_class.model_type, model.__name__) for model in (*HIGHWAYS, AViT)
)

VIT = {
    "image_size": 16,
    "patch_size": 2,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "attn_implementation": "eager",
}
DINO = {name: value for name, value in VIT.items() if name != "intermediate_size"}
BEIT = {**VIT, "use_relative_position_bias": True}
TEXTS = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 4}
WHOLE = {**VIT, "whole": True}
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 2, 1],
    "num_heads": [2, 2, 4],
    "window_size": 2,
    "mlp_ratio": 2.0,
}


class ImageModelTester:
    """What the common tests ask for: a tiny config, images, and the sizes of what comes out."""

    batch_size = 4
    num_channels = 3
    is_training = True

    def __init__(self, config_class, settings, num_prefix_tokens):
        self.config_class, self.settings = config_class, settings
        for name, value in settings.items():
            setattr(self, name, value)
        num_patches = (self.image_size // self.patch_size) ** 2
        self.seq_length = num_patches + num_prefix_tokens
        # a bare backbone takes masked patches
        self.mask_length, self.num_masks = num_patches, num_patches // 2

    def get_config(self):
        settings = dict(self.settings)
        # of a model of images and texts the settings of the image side
        if settings.pop("whole", False):
            return self.config_class(vision_config=settings, text_config=TEXTS, attn_implementation="eager")
        return self.config_class(**settings)

    def prepare_config_and_inputs_for_common(self):
        pixels = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        return self.get_config(), {"pixel_values": pixels}


class ImageModelTests(ModelTesterMixin):
    """The common tests, set for image classifiers as upstream sets them."""

    settings = VIT
    num_prefix_tokens = 1
    config_properties = None
    # text has these
    test_resize_embeddings = False
    test_pruning = False
    test_head_masking = False

    def setUp(self):
        config_class = self.all_model_classes[0].config_class
        self.model_tester = ImageModelTester(config_class, self.settings, self.num_prefix_tokens)
        self.config_tester = ConfigTester(
            self, config_class=config_class, has_text_modality=False, common_properties=self.config_properties
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_get_set_embeddings(self):
        # patches, not words
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            embeddings = model.get_input_embeddings()
            assert any(isinstance(module, nn.Conv2d) for module in embeddings.modules())
            assert model.get_output_embeddings() is None


class SwinTests(ImageModelTests):
    """Swin halves the grid and doubles the width behind each stage but the last."""

    settings = SWIN
    num_prefix_tokens = 0
    config_properties = ["image_size", "patch_size", "num_channels"]

    def outputs_of(self, model_class, name, by_config):
        """What `name` is, asked for in the config or in the call."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config._attn_implementation = "eager"
        if by_config:
            setattr(config, f"output_{name}", True)
        else:
            inputs[f"output_{name}"] = True
        with torch.no_grad():
            return getattr(model_class(config).eval()(**inputs), name)

    def test_attention_outputs(self):
        for model_class in self.all_model_classes:
            for by_config in (False, True):
                attentions = self.outputs_of(model_class, "attentions", by_config)
                window = SWIN["window_size"] ** 2
                assert [list(attention.shape[-3:]) for attention in attentions] == [
                    [num_heads, window, window] for num_heads in SWIN["num_heads"]
                ]

    def test_hidden_states_output(self):
        grid, width = SWIN["image_size"] // SWIN["patch_size"], SWIN["embed_dim"]
        shapes = [[grid**2, width], [(grid // 2) ** 2, 2 * width], [(grid // 4) ** 2, 4 * width]]
        for model_class in self.all_model_classes:
            for by_config in (False, True):
                states = self.outputs_of(model_class, "hidden_states", by_config)
                assert [list(state.shape[-2:]) for state in states] == [*shapes, shapes[-1]]


class OurTests:
    """What differs where `classifier` is not the only one: upstream's test looks for no other."""

    def test_can_load_ignoring_mismatched_shapes(self):
        for model_class in self.all_model_classes:
            self.check_new_classifiers(model_class(self.model_tester.get_config()))

    def check_new_classifiers(self, model):
        """All that has a row per label is made anew, and said to be; all else is what it was."""
        of_labels = {name for name, tensor in model.named_parameters() if tensor.shape[0] == model.config.num_labels}
        assert len(of_labels) >= 2
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            with pytest.raises(RuntimeError, match="mismatch"):
                type(model).from_pretrained(folder, num_labels=42)
            with CaptureLogger(logging.get_logger("transformers.modeling_utils")) as said:
                new, info = type(model).from_pretrained(
                    folder, num_labels=42, ignore_mismatched_sizes=True, output_loading_info=True
                )
        # names in transformers 4, names and shapes in 5
        assert {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]} == of_labels
        assert "did not match" in said.out
        for (name, fresh), trained in zip(new.named_parameters(), model.parameters(), strict=True):
            if name in of_labels:
                assert fresh.shape == (42, *trained.shape[1:]) and fresh.isfinite().all()
                # SigLIP begins its own at 1 / sqrt(width) and more
                assert fresh.mean().abs() < 0.1 and fresh.std() < 0.22
            else:
                assert torch.equal(fresh, trained), name


class HighwayTests(OurTests):
    """And without exits a highway passes upstream's test too."""

    def test_can_load_ignoring_mismatched_shapes(self):
        super().test_can_load_ignoring_mismatched_shapes()
        self.model_tester.settings = {**self.settings, "exit_positions": [], "exit_policy": "never"}
        super(OurTests, self).test_can_load_ignoring_mismatched_shapes()


class ViTTest(ImageModelTests, TestCase):
    all_model_classes = (ViTModel, ViTForImageClassification)


class ViTHighwayTest(HighwayTests, ImageModelTests, TestCase):
    all_model_classes = (ViTHighway,)
    settings = {**VIT, "exit_positions": [1], "exit_types": "conv1_1"}


class DeiTTest(ImageModelTests, TestCase):
    all_model_classes = (DeiTModel, DeiTForImageClassification)
    num_prefix_tokens = 2


class DeiTHighwayTest(HighwayTests, ImageModelTests, TestCase):
    all_model_classes = (DeiTHighway,)
    num_prefix_tokens = 2
    settings = {**VIT, "exit_positions": [1], "exit_types": "attention_r2"}


class SwinTest(SwinTests, TestCase):
    all_model_classes = (SwinModel, SwinForImageClassification)


class SwinHighwayTest(HighwayTests, SwinTests, TestCase):
    all_model_classes = (SwinHighway,)
    settings = {**SWIN, "exit_positions": [1, 3], "exit_types": "conv2_1"}


class MaskTokenTests(ImageModelTests):
    """Only pretraining reads the mask token, of upstream's own classes as well."""

    test_all_params_have_gradient = False


class Dinov2Test(MaskTokenTests, TestCase):
    all_model_classes = (Dinov2Model, Dinov2ForImageClassification)
    settings = DINO


class Dinov2HighwayTest(HighwayTests, MaskTokenTests, TestCase):
    all_model_classes = (Dinov2Highway,)
    settings = {**DINO, "exit_positions": [1], "exit_types": "concat"}


class Dinov2WithRegistersTest(MaskTokenTests, TestCase):
    all_model_classes = (Dinov2WithRegistersModel, Dinov2WithRegistersForImageClassification)
    settings, num_prefix_tokens = {**DINO, "num_register_tokens": 2}, 3


class Dinov2WithRegistersHighwayTest(HighwayTests, MaskTokenTests, TestCase):
    all_model_classes = (Dinov2WithRegistersHighway,)
    settings = {**DINO, "num_register_tokens": 2, "exit_positions": [1], "exit_types": "linear"}
    num_prefix_tokens = 3


class Dinov3ViTTest(MaskTokenTests, TestCase):
    all_model_classes = (DINOv3ViTModel,)
    settings, num_prefix_tokens = {**VIT, "num_register_tokens": 2}, 3


class Dinov3ViTHighwayTest(HighwayTests, MaskTokenTests, TestCase):
    all_model_classes = (Dinov3ViTHighway,)
    settings = {**VIT, "num_register_tokens": 2, "exit_positions": [1], "exit_types": "conv1_1"}
    num_prefix_tokens = 3


class SiglipTest(ImageModelTests, TestCase):
    all_model_classes = (SiglipForImageClassification,)
    settings, num_prefix_tokens = WHOLE, 0


class TowerTests(HighwayTests, ImageModelTests):
    """The image side is no model of its own in transformers 4, and cannot be saved alone."""

    test_correct_missing_keys = None


class SiglipHighwayTest(TowerTests, TestCase):
    all_model_classes = (SiglipHighway,)
    settings = {**VIT, "exit_positions": [1], "exit_types": "conv1_1"}
    num_prefix_tokens = 0


class CLIPTest(ImageModelTests, TestCase):
    all_model_classes = (CLIPForImageClassification,)
    settings = WHOLE


class CLIPHighwayTest(TowerTests, TestCase):
    all_model_classes = (CLIPHighway,)
    settings = {**VIT, "exit_positions": [1], "exit_types": "attention_r2"}


class BeitTest(ImageModelTests, TestCase):
    all_model_classes = (BeitModel, BeitForImageClassification)
    settings = BEIT


class BeitHighwayTest(HighwayTests, ImageModelTests, TestCase):
    all_model_classes = (BeitHighway,)
    settings = {**BEIT, "exit_positions": [1], "exit_types": "conv1_1"}


class ViTMSNTest(ImageModelTests, TestCase):
    all_model_classes = (ViTMSNModel, ViTMSNForImageClassification)


class ViTMSNHighwayTest(HighwayTests, ImageModelTests, TestCase):
    all_model_classes = (ViTMSNHighway,)
    settings = {**VIT, "exit_positions": [1], "exit_types": "linear"}


class IJepaTest(ImageModelTests, TestCase):
    all_model_classes = (IJepaModel, IJepaForImageClassification)
    num_prefix_tokens = 0


class IJepaHighwayTest(HighwayTests, ImageModelTests, TestCase):
    all_model_classes = (IJepaHighway,)
    settings = {**VIT, "exit_positions": [1], "exit_types": "conv2_1"}
    num_prefix_tokens = 0


class AViTTest(OurTests, ImageModelTests, TestCase):
    all_model_classes = (AViT,)
    settings = {**VIT, "gate": "student"}

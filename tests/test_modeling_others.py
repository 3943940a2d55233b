"""The backbones beside ViT, DeiT and Swin: one test class each, and what is special about one."""

import pytest
import torch

from lgvit_hf import Dinov3ViTHighway
from lgvit_hf.hub.loading import BY_BACKBONE
from lgvit_hf.plain_checkpoint import HIGHWAY_NAMES
from tests.test_modeling_common import MIXES, AnyHighwayTesterMixin, SomeHighwayTesterMixin
from tests.tiny import MODELS, OTHER_KINDS, tiny_images, tiny_model, tiny_native


def test_every_backbone_has_its_class():
    assert {kind: highway.__name__ for kind, highway in BY_BACKBONE.items()} == HIGHWAY_NAMES


VARIANTS = {
    "shared bias": ("beit", {"use_relative_position_bias": False, "use_shared_relative_position_bias": True}),
    "class token": ("beit", {"use_mean_pooling": False, "use_absolute_position_embeddings": True}),
    "no layer scale": ("beit", {"layer_scale_init_value": 0.0}),
    "SwiGLU": ("dinov2", {"use_swiglu_ffn": True}),
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_variants_answer_as_upstream(name):
    kind, settings = VARIANTS[name]
    native, images = tiny_native(kind, **settings), tiny_images(3)
    highway = MODELS[kind].from_backbone(native, exit_positions=[2], exit_types="linear")
    assert torch.equal(highway(images, early_exit=False).logits, native(images).logits)


@pytest.mark.parametrize("kind", OTHER_KINDS)
@torch.no_grad()
def test_other_sizes_and_inner_states_are_those_of_upstream(kind):
    native = tiny_native(kind, bare=True, attn_implementation="eager")
    highway = MODELS[kind].from_backbone(native, num_labels=4, exit_positions=[2], exit_types="conv1_1")
    asked = {"output_hidden_states": True, "output_attentions": True}
    for size in ((16, 16), (24, 24), (16, 24)):
        images, more = tiny_images(2, size), {}
        if not highway.takes_any_size:
            more = {"interpolate_pos_encoding": True}
        ours, theirs = (model(images, **asked, **more) for model in (highway, native))
        assert len(ours.hidden_states) == len(theirs.hidden_states) == 7
        # the last may come after the final norm there
        for mine, expected in zip(ours.hidden_states[:-1], theirs.hidden_states[:-1], strict=True):
            assert torch.equal(mine, expected)
        for mine, expected in zip(ours.attentions, theirs.attentions, strict=True):
            assert torch.equal(mine, expected)
        assert highway(images, **more).logits.shape == (2, 4)


class FewHeads:
    """Heads and policies are those of the engine: for most backbones one mix of heads will do."""

    @pytest.mark.parametrize("heads", [MIXES["blocks"]], ids=["blocks"])
    def test_law(self, heads):
        super().test_law(heads)

    @pytest.mark.parametrize("heads", [MIXES["lgvit"]], ids=["lgvit"])
    def test_truncate(self, heads, tmp_path):
        super().test_truncate(heads, tmp_path)


class TestDinov2Highway(SomeHighwayTesterMixin):
    kind = "dinov2"


class TestDinov2WithRegistersHighway(FewHeads, SomeHighwayTesterMixin):
    kind = "dinov2_with_registers"


class TestSiglipHighway(SomeHighwayTesterMixin):
    kind = "siglip"


class TestCLIPHighway(FewHeads, SomeHighwayTesterMixin):
    kind = "clip"


class TestBeitHighway(SomeHighwayTesterMixin):
    kind = "beit"


class TestViTMSNHighway(FewHeads, SomeHighwayTesterMixin):
    kind = "vit_msn"


class TestIJepaHighway(FewHeads, SomeHighwayTesterMixin):
    kind = "ijepa"


class TestDinov3ViTHighway(FewHeads, AnyHighwayTesterMixin):
    """Of which upstream has no classifier."""

    kind = "dinov3_vit"

    @torch.no_grad()
    def test_the_classifier_reads_what_upstream_gives(self, tmp_path):
        native = tiny_native("dinov3_vit")
        native.save_pretrained(tmp_path)
        for images in (tiny_images(3), tiny_images(3, (24, 8))):
            hidden = native(images).last_hidden_state
            expected = torch.cat([hidden[:, 0], hidden[:, 4:].mean(1)], dim=1)
            for source in (native, tmp_path):
                highway = Dinov3ViTHighway.from_backbone(source, num_labels=4, exit_positions=[2])
                out = highway(images, early_exit=False)
                assert torch.equal(out.logits, highway.classifier(expected))

    @torch.no_grad()
    def test_training_jitters_all_blocks_of_a_forward_alike(self):
        model, seen = tiny_model("dinov3_vit").train(), []
        for layer in model.layers:
            layer.register_forward_pre_hook(
                lambda *given: seen.append(given[2]["position_embeddings"]), with_kwargs=True
            )
        for _ in range(2):
            model(tiny_images(2))
        first, second = seen[:6], seen[6:]
        assert all(torch.equal(cos, first[0][0]) and torch.equal(sin, first[0][1]) for cos, sin in first)
        assert all(torch.equal(cos, second[0][0]) for cos, _ in second) and not torch.equal(first[0][0], second[0][0])

import torch

from tests.test_modeling_common import HighwayTesterMixin
from tests.tiny import tiny_images, tiny_model


class TestSwinHighway(HighwayTesterMixin):
    kind = "swin"
    pools = ("mean",)
    # patches that do not fill whole windows, and grids that do not halve, are padded
    image_sizes = ((24, 24), (16, 24), (32, 16), (18, 22), (15, 17))

    test_attention_implementations_agree = None  # there is only one

    @torch.no_grad()
    def test_exits_stand_before_the_merging_and_see_the_width_of_their_stage(self):
        model = tiny_model("swin", exit_positions=[1, 2, 3, 4, 5], exit_types="conv2_1")
        features = model(tiny_images(2), early_exit=False).exit_features
        assert [tuple(f.shape[1:]) for f in features] == [(64, 16)] * 2 + [(16, 32)] * 2 + [(4, 64)] * 2
        assert [model.config.stage_of(after) for after in range(1, 7)] == [0, 0, 1, 1, 2, 2]

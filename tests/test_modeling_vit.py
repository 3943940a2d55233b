import torch

from tests.test_modeling_common import HighwayTesterMixin
from tests.tiny import tiny_images, tiny_model


class TestViTHighway(HighwayTesterMixin):
    kind = "vit"

    @torch.no_grad()
    def test_mean_pooling_averages_every_token(self):
        model = tiny_model("vit", exit_positions=[2, 4], pool="mean")
        tokens = model.vit(tiny_images(3)).last_hidden_state
        torch.testing.assert_close(model(tiny_images(3), early_exit=False).logits, model.classifier(tokens.mean(1)))

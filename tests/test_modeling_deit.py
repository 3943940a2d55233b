import torch

from tests.test_modeling_common import HighwayTesterMixin, SomeHighwayTesterMixin
from tests.tiny import tiny_images, tiny_model


class TestDeiTHighway(HighwayTesterMixin):
    """With a classifier on the distillation token."""

    kind = "deit"
    pools = ("cls",)

    def test_exits_have_two_classifiers(self):
        assert all(len(head.classifiers) == 2 for head in tiny_model("deit").exits)


class TestPlainDeiTHighway(SomeHighwayTesterMixin):
    """As `DeiTForImageClassification`: the distillation token is there, and nothing reads it."""

    kind = "deit_plain"

    def test_exits_have_one_classifier(self):
        assert all(len(head.classifiers) == 1 for head in tiny_model("deit_plain").exits)

    @torch.no_grad()
    def test_mean_pooling_averages_every_token(self):
        model = tiny_model("deit_plain", exit_positions=[2, 4], pool="mean")
        tokens = model.deit(tiny_images(3)).last_hidden_state
        torch.testing.assert_close(model(tiny_images(3), early_exit=False).logits, model.classifier(tokens.mean(1)))

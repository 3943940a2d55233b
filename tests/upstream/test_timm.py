"""The recipe of `docs/backbones.md` for timm's models, run as it stands there on timm as it was released."""

import os
import re
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import transformers
from torch import nn
from transformers.utils import import_utils

from lgvit_hf import HighwayWrapper
from tests.tiny import scrambled, tiny_images

PAGE = Path(__file__).resolve().parents[2] / "docs/backbones.md"
TORCHVISION = ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional")


@pytest.fixture
def timm(monkeypatch):
    """timm, which imports torchvision for images and one layer of detectors: that is made up here.

    Builds of torchvision cannot be imported beside a torch without CUDA, so that transformers would not see timm.
    """
    monkeypatch.syspath_prepend(Path(os.environ["TRANSFORMERS_TESTS"], "with_timm").resolve())
    for name in TORCHVISION:
        monkeypatch.setitem(sys.modules, f"torchvision{name}", MagicMock())
    sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (nn.Module,), {})
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "timm", (lambda: True, ""))
    for module in (import_utils, transformers.utils):
        monkeypatch.setattr(module, "is_timm_available", lambda: True)


@torch.no_grad()
def test_recipe(timm, tmp_path):
    (recipe,) = re.findall(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    made, images = {}, tiny_images(12, 32)
    exec(recipe, made)
    for plain, early in ((made["resnet"], made["early_resnet"]), (made["vit"], made["early_vit"])):
        assert type(plain.timm_model).__module__.startswith("timm.models.")
        # the weights are those of `plain`
        scrambled(early)
        everything = early(images, early_exit=False)
        assert torch.equal(everything.logits, plain(images).logits)
        scores = everything.exit_logits[0].softmax(-1).amax(-1).sort().values
        early.set_exit_policy("confidence", threshold=float(scores[5:7].mean()))
        out = early(images)
        assert 0 in out.exit_index and len(set(out.exit_index.tolist())) > 1
        for number in range(12):
            alone = early(images[number : number + 1])
            assert alone.exit_index.item() == out.exit_index[number]
            torch.testing.assert_close(alone.logits[0], out.logits[number], rtol=1e-4, atol=1e-4)
    early.save_pretrained(tmp_path)
    again = HighwayWrapper.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(images, early_exit=False).logits, everything.logits)

"""Cutting leaves the user's module as it was, whatever it caches; and a cache never outlives the weights it is of."""

import functools
import threading

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers import LevitConfig, LevitForImageClassification

from lgvit_hf import HighwayWrapper
from tests.seeds import seeded
from tests.tiny import scrambled, tiny_images

WIDTH, PLACES = 8, 16


class Net(nn.Module):
    """Two blocks, each of which adds a bias to what it is given: made of its weights, or of sizes alone."""

    def __init__(self, block):
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.first, self.second = block(), block()
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.second(torch.relu(self.first(x))).mean(1))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.biases = nn.Parameter(torch.randn(PLACES))
        self.fc = nn.Linear(WIDTH, WIDTH)

    def made(self) -> Tensor:
        return self.biases.flip(0)[:, None] * 2

    def forward(self, x):
        return x + self.fc(x) + self.bias(x)


def waves(places: int) -> Tensor:
    return torch.linspace(0, 3, places).sin()[:, None]


class InDict(Block):
    """LeViT's."""

    def __init__(self):
        super().__init__()
        self.cache = {}

    def train(self, mode=True):
        self.cache = {} if mode and getattr(self, "cache", None) else getattr(self, "cache", {})
        return super().train(mode)

    def bias(self, x):
        if self.training:
            return self.made()
        if str(x.device) not in self.cache:
            self.cache[str(x.device)] = self.made()
        return self.cache[str(x.device)]


class OnEval(Block):
    """TinyViT's, whose `train` gives nothing back."""

    def train(self, mode=True):
        super().train(mode)
        with torch.no_grad():
            self.kept = None if mode else self.made()

    def bias(self, x):
        return self.made() if self.training else self.kept


class InList(Block):
    def __init__(self):
        super().__init__()
        self.cache = [[], ()]

    def bias(self, x):
        if not self.cache[0]:
            self.cache[0].append(waves(x.shape[1]))
        return self.cache[0][0]


class InAttribute(Block):
    cos = None

    def bias(self, x):
        if self.cos is None or len(self.cos) != x.shape[1]:
            self.cos = waves(x.shape[1])
        return self.cos


class InBuffer(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", None, persistent=False)

    def bias(self, x):
        if self.mask is None:
            self.mask = waves(x.shape[1])
        return self.mask


class OfMethod(Block):
    @functools.lru_cache  # noqa: B019
    def waves(self, places):
        return waves(places)

    def bias(self, x):
        return self.waves(x.shape[1])


shared_waves = functools.lru_cache(waves)


class OfFunction(Block):
    def bias(self, x):
        return shared_waves(x.shape[1])


class NoCopy(InDict):
    """It cannot be copied."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


BLOCKS = [InDict, OnEval, InList, InAttribute, InBuffer, OfMethod, OfFunction, NoCopy]


def levit():
    settings = {"hidden_sizes": [16, 32, 48], "num_attention_heads": [1, 2, 3], "depths": [1, 1, 1]}
    return LevitForImageClassification(LevitConfig(image_size=32, key_dim=[8, 8, 8], num_labels=5, **settings))


def answer(net, images):
    found = net(images)
    return getattr(found, "logits", found)


def cut_case(made):
    """A module, where it is cut, and images."""
    shared_waves.cache_clear()
    seeded()
    if made is levit:
        return scrambled(levit()), "levit.encoder.stages.0", tiny_images(4, size=32)
    return scrambled(Net(made)), "first", tiny_images(4)


@pytest.mark.parametrize(
    ("made", "has_run"),
    [
        *(
            pytest.param(block, has_run, marks=pytest.mark.version_independent)
            for block in BLOCKS
            for has_run in (False, True)
        ),
        (levit, False),
    ],
)
@torch.no_grad()
def test_cutting_leaves_the_module_as_it_was(made, has_run):
    net, name, images = cut_case(made)
    if has_run:
        with torch.enable_grad():
            answer(net, images)  # what is cached belongs to a graph of gradients
    assert name in HighwayWrapper.cut_points(net, images[:1])
    assert not any(isinstance(held, FakeTensor) for module in net.modules() for held in vars(module).values())
    expected = answer(net, images)
    assert type(expected) is Tensor
    # as docs/any-model.md has it
    model = HighwayWrapper(net, after=[name], example=images[:1])
    torch.testing.assert_close(model(images, early_exit=False).logits, expected)
    again = answer(net, images)
    assert type(again) is Tensor and torch.equal(again, expected)


@pytest.mark.version_independent
@pytest.mark.parametrize("made", [InDict, OnEval, InAttribute])
def test_what_is_cached_does_not_outlive_the_weights(made):
    net, name, images = cut_case(made)
    model = HighwayWrapper(net, after=[name], example=images[:1])
    model.train()
    torch.testing.assert_close(model(images[:2], early_exit=False).logits, answer(net, images[:2]))
    with torch.no_grad():
        before = model.eval()(images, early_exit=False).logits
        model.train()
        for parameter in net.parameters():
            parameter.mul_(1.5)
        model.eval()
        expected = answer(net, images)
        assert not torch.allclose(before, expected)
        torch.testing.assert_close(model(images, early_exit=False).logits, expected)

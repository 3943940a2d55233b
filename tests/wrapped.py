"""Eight families of tiny image classifiers that know nothing of exits: 32 x 32 pixels, 5 labels, random weights."""

import torch
from torch import nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    MobileViTConfig,
    MobileViTForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from lgvit_hf import HighwayWrapper
from tests.seeds import seeded
from tests.tiny import NUM_LABELS, scrambled

SIZE = 32
EXAMPLE = torch.zeros(1, 3, SIZE, SIZE)


class ResidualBlock(nn.Module):
    """As in a ResNet: one activation module that runs twice, changes in place, a skip connection."""

    def __init__(self, width_in, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Conv2d(width_in, width, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResidualNet(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.layer1 = nn.Sequential(ResidualBlock(8, 8, 1), ResidualBlock(8, 8, 1))
        self.layer2 = nn.Sequential(ResidualBlock(8, 16, 2), ResidualBlock(16, 16, 1))
        self.layer3 = ResidualBlock(16, 24, 2)
        self.dropout, self.fc = nn.Dropout(dropout), nn.Linear(24, NUM_LABELS)

    def forward(self, x):
        maps = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(self.dropout(maps.mean((2, 3))))


def vgg():
    """A `Sequential` inside a `Sequential`, activations in place, batch norm and dropout."""
    features = []
    for width_in, width in ((3, 8), (8, 16), (16, 24)):
        features += [nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        features.append(nn.MaxPool2d(2))
    classifier = nn.Sequential(nn.Linear(384, 32), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(32, NUM_LABELS))
    return nn.Sequential(nn.Sequential(*features), nn.Flatten(), classifier)


class MLP(nn.Module):
    """Vectors, an answer in a tuple, and layers in a list that a loop runs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3 * SIZE**2, 24), nn.Linear(24, 24), nn.Linear(24, 24)])
        self.head = nn.Linear(24, NUM_LABELS)

    def forward(self, x):
        hidden = x.flatten(1)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return self.head(hidden), hidden


def _resnet():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=5)
    return ResNetForImageClassification(config), ["resnet.embedder", "resnet.encoder.stages.0"]


def _convnext():
    config = ConvNextConfig(
        image_size=SIZE, hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, drop_path_rate=0.1, num_labels=5
    )
    return ConvNextForImageClassification(config), ["convnext.encoder.stages.0", "convnext.encoder.stages.1.layers.0"]


def _dinov2():
    config = Dinov2Config(
        image_size=SIZE, patch_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_labels=5
    )
    return Dinov2ForImageClassification(config), ["dinov2.encoder.layer.0", "dinov2.encoder.layer.1"]


def _beit():
    sizes = {"image_size": SIZE, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32}
    config = BeitConfig(
        **sizes, num_hidden_layers=3, num_attention_heads=2, use_relative_position_bias=True, num_labels=5
    )
    model = BeitForImageClassification(config)
    # `encoder.layer` in transformers 4, `layers` in 5
    layers = "beit.layers" if hasattr(model.beit, "layers") else "beit.encoder.layer"
    return model, [f"{layers}.0", f"{layers}.1"]


def _mobilevit():
    config = MobileViTConfig(
        image_size=SIZE,
        hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
        num_attention_heads=2,
        num_labels=5,
    )
    model = MobileViTForImageClassification(config)
    for module in model.modules():
        if hasattr(module, "transformer"):  # 2, 4 and 3 layers, which no setting changes, and which take long to trace
            module.transformer.layer = module.transformer.layer[:1]
    return model, ["mobilevit.encoder.layer.1", "mobilevit.encoder.layer.3"]


BUILDERS = {
    "resnet": _resnet,
    "convnext": _convnext,
    "dinov2": _dinov2,
    "beit": _beit,
    "mobilevit": _mobilevit,
    "vgg": lambda: (vgg(), ["0.2", "0.7", "0"]),
    "residual": lambda: (ResidualNet(0.2), ["layer1.0", "layer2", "layer3.conv1"]),
    "mlp": lambda: (MLP(), ["layers.0", "layers.1"]),
}


def plain(family, seed=0):
    """A classifier in `eval()` mode, and names of submodules to put exits behind."""
    seeded(seed)
    module, after = BUILDERS[family]()
    scrambled(module)
    if family == "mobilevit":
        # many layers, each of which shrinks what it is given: images would all look alike at the end
        for parameter in module.parameters():
            parameter.requires_grad_(False).mul_(1.6 if parameter.dim() > 1 else 1.0).requires_grad_(True)
    return module, after


def wrapped(family, heads="auto", **settings):
    """The same with exits, whose weights are random too."""
    module, after = plain(family)
    model = HighwayWrapper(module, after, heads, example=EXAMPLE, **settings)
    scrambled(model.exits)
    return model

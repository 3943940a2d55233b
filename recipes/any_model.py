"""A network that knows nothing of exits gets some: wrap, train, calibrate, judge. TARDIS's demo, done right.

    python recipes/any_model.py --network resnet --data cifar10/ --images 15000 --epochs 5 --output runs/resnet
    python recipes/any_model.py --network vgg --dry-run

A small ResNet (cut by its graph) or VGG (a chain, cut as it is) for 32 x 32 pixels is trained from scratch together
with its exits. The exits that pay and one threshold for them are then chosen on the validation split, so that at most
`--max-accuracy-drop` is lost, and the test split says what came of it: a table of exits with MACs and the clock, and a
picture of accuracy against cost. `--dry-run` prints where the network can be cut and what each exit costs.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import set_seed

from lgvit_hf import HighwayTrainer, HighwayTrainingArguments, HighwayWrapper, calibrate, collect
from lgvit_hf.data.datasets import load_images
from lgvit_hf.data.processing import ProcessedImages, make_processor
from lgvit_hf.evaluation.costs import model_macs
from lgvit_hf.evaluation.plots import plot_pareto
from lgvit_hf.evaluation.report import evaluate, evaluate_as_text
from lgvit_hf.evaluation.sweep import threshold_curve
from lgvit_hf.files import add_files, write_json

SIZE = 32


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (https://arxiv.org/abs/1512.03385)."""

    def __init__(self, width_in, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """14 layers: three stages of two blocks, 16, 32 and 64 channels."""

    def __init__(self, num_labels):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(ResidualBlock(16, 16, 1), ResidualBlock(16, 16, 1))
        self.layer2 = nn.Sequential(ResidualBlock(16, 32, 2), ResidualBlock(32, 32, 1))
        self.layer3 = nn.Sequential(ResidualBlock(32, 64, 2), ResidualBlock(64, 64, 1))
        self.fc = nn.Linear(64, num_labels)

    def forward(self, x):
        return self.fc(self.layer3(self.layer2(self.layer1(self.stem(x)))).mean((2, 3)))


def vgg(num_labels):
    """Three stages of two convolutions (https://arxiv.org/abs/1409.1556) and a classifier of two layers."""
    layers = []
    for width_in, width in ((3, 32), (32, 64), (64, 128)):
        for inputs in (width_in, width):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        layers.append(nn.MaxPool2d(2))
    classifier = [nn.Flatten(), nn.Linear(2048, 256), nn.ReLU(inplace=True), nn.Dropout(0.2)]
    return nn.Sequential(nn.Sequential(*layers), *classifier, nn.Linear(256, num_labels))


# the network, and the names behind which exits stand
NETWORKS = {
    "resnet": (ResNet, ["layer1.0", "layer1", "layer2.0", "layer2", "layer3.0"]),
    "vgg": (vgg, ["0.2", "0.6", "0.9", "0.13", "0.16"]),
}


def wrapped(network, label_names):
    build, after = NETWORKS[network]
    return HighwayWrapper(
        build(len(label_names)),
        after,
        example=torch.zeros(1, 3, SIZE, SIZE),
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
        # all answers count alike; a list of numbers, one per exit and one for the network itself, works as well
        exit_loss_weights="uniform",
    )


def print_plan(model):
    names = HighwayWrapper.cut_points(model.wrapped, torch.zeros(1, 3, SIZE, SIZE))
    print(f"{len(names)} places where it can be cut: {', '.join(names)}\n")
    costs = model_macs(model)
    for index, name in enumerate([*model.config.after, "the network's own answer"]):
        shape = " x ".join(map(str, model.config.exit_shapes[index])) if index < len(model.exits) else ""
        print(f"exit {index}  {name:<26}{shape:<14}{costs.of_exit(index) / 1e6:8.2f} MMACs until there")


def draw(file, report, table):
    overall = report["overall"]
    plot_pareto(
        file,
        {
            "one threshold for all exits": [
                {"cost": row["mean_macs"] / 1e6, "accuracy": row["accuracy"]} for row in threshold_curve(table)
            ]
        },
        {
            "chosen on the validation split": {"cost": overall["mean_macs"] / 1e6, "accuracy": overall["accuracy"]},
            "full model": {"cost": overall["backbone_macs"] / 1e6, "accuracy": overall["accuracy_full_model"]},
        },
        unit="million MACs per image, heads counted",
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(NETWORKS), default="resnet")
    parser.add_argument("--data", default="digits", help="as of `lgvit train`: a folder, parquet files, a Hub id")
    parser.add_argument("--images", type=int, help="train on so many images; all by default")
    parser.add_argument("--test-images", type=int, help="report on so many images; all by default")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--max-accuracy-drop", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="folder for the model, results.json and pareto.png")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained, and write nothing")
    options = parser.parse_args(arguments)
    if not options.dry_run and options.output is None:
        parser.error("give --output FOLDER, or --dry-run")

    set_seed(options.seed)
    splits, processor = load_images(options.data, seed=options.seed), make_processor(SIZE)
    model = wrapped(options.network, splits.label_names)
    if options.dry_run:
        return print_plan(model)

    def some(images, limit):
        images = images if limit is None else images.shuffle(seed=options.seed).select(range(limit))
        return ProcessedImages(images, processor, keep=True)

    output = Path(options.output)
    settings = HighwayTrainingArguments(
        str(output / "training"),
        strategy="weighted",
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        weight_decay=0.05,
        warmup_steps=50,
        lr_scheduler_type="cosine",
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        seed=options.seed,
    )
    trained = HighwayTrainer(model, settings, train_dataset=some(splits.train, options.images)).train()
    model.eval()

    choice = calibrate(collect(model, some(splits.validation, None)), max_accuracy_drop=options.max_accuracy_drop)
    print(choice.as_text())
    model.set_exit_policy(choice.policy)

    test = some(splits.test, options.test_images)
    report = evaluate(model, test)
    print(evaluate_as_text(report))
    with add_files(output) as folder:
        draw(folder / "pareto.png", report, collect(model, test))
    write_json(output / "results.json", {**report, "seconds_of_training": trained.metrics["train_runtime"]})
    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")


if __name__ == "__main__":
    main()

"""`lgvit train --stage head`: the final classifier alone, fitted on cached features of the frozen backbone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset
from transformers import BaseImageProcessor
from transformers.utils.logging import tqdm

from ..data.batches import in_batches, to_model
from ..losses import check_labels
from ..modeling_highway import HighwayMixin
from ..segments import Segment, State, Tokens
from .cached_states import TokenShape, fill_cache, open_cache
from .distill_exits import backbone_digest, cache_folder, gone_if_it_fails
from .linear_fit import fit_linear
from .run import save_trained

logger = logging.getLogger(__name__)

# penalties that are tried: few images want strong ones
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)
# the logit of a class, all others 0: of a million others together the probability is below 1e-6
CERTAIN = 30.0
# an eighth of them chooses the penalty
FEWEST_IMAGES = 16


def train_classifier(
    model: HighwayMixin,
    processor: BaseImageProcessor,
    train_dataset: Dataset,
    validation_dataset: Dataset,
    test_dataset: Dataset,
    output: str | Path,
    *,
    say: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Fit the final classifier of a highway without exits to labels, everything else frozen, and save it to `output`.

    The backbone runs once on each sample, and what its classifier is given is kept on disk, in half precision: a
    stopped run goes on when it is started again. A distilled DeiT's two classifiers are fitted one by one.

    Args:
        model (`HighwayMixin`): Without exits; its classifier is replaced, in place.
        processor (`BaseImageProcessor`): Saved beside the model.
        train_dataset, validation_dataset, test_dataset (`Dataset`): Items `pixel_values` and `labels`.
        output (`str` or `Path`): A new or empty folder.
        say (callable, *optional*): Takes the lines to show.

    Returns:
        `seconds`, and the accuracies of the `validation` and the `test` samples.

    Raises:
        ValueError: Too few samples; a model that has exits, which answer for its present classifier, or that has no
            linear classifier.
        OSError: Too little disk.
    """
    if model.exits:
        raise ValueError(
            f"--stage head fits the final classifier, and the model has exits after {model.config.exit_positions}, "
            "trained beside the present one; start from a model without exits and let `lgvit grow` add them"
        )
    started, classifiers = time.perf_counter(), final_classifiers(model)
    model.eval()
    num_trained, num_labels = len(train_dataset), model.config.num_labels  # type: ignore[arg-type]  # has a length
    if num_trained < FEWEST_IMAGES:
        raise ValueError(f"{num_trained} images are too few to fit a classifier on; give {FEWEST_IMAGES}")
    samples: Any = ConcatDataset([train_dataset, validation_dataset])
    with cache_folder(output, say) as folder, ExitStack() as stack:
        backbone: Any = model.base_model
        width = classifiers[0].in_features
        shape = TokenShape(0, (0, 0), width, reduced=len(classifiers))
        made_from = {"what": "features of the classifier", "checkpoint": backbone_digest(backbone)}
        cache = open_cache(folder, [shape], len(samples), num_labels, made_from)
        stack.enter_context(gone_if_it_fails(folder))
        say(f"{num_trained} images to fit the classifier on, {len(samples) - num_trained} in validation")
        seen: Any = ClassifierInputs(model, classifiers)
        fill_cache(cache, seen, samples, range(len(samples)), progress=partial(tqdm, desc="backbone"))
        labels, features = cache.labels, cache.states(0).float()
        if labels is None:
            raise ValueError("labels: some images have none, and a classifier is fitted to them")
        check_labels(labels, num_labels)
        order = torch.randperm(num_trained, generator=torch.Generator().manual_seed(0))
        # labels as the logits of a teacher that is certain
        certain = CERTAIN * F.one_hot(labels[order], num_labels).float()
        logits = torch.zeros(len(samples) - num_trained, num_labels)
        for index, classifier in enumerate(classifiers):
            weight, bias = fit_linear(features[order, index], certain, 1.0, PENALTIES)
            logits += F.linear(features[num_trained:, index], weight, bias) / len(classifiers)
            classifier.weight.data.copy_(weight)
            classifier.bias.data.copy_(bias)
        validation = (logits.argmax(-1) == labels[num_trained:]).float().mean().item()
        say(f"{validation:.1%} right in validation")
        accuracy = _accuracy(model, test_dataset)
        Path(output).mkdir(parents=True, exist_ok=True)
        save_trained(model, processor, Path(output))
    depth = model.config.num_blocks
    return {
        "seconds": time.perf_counter() - started,
        "validation": {"accuracy": validation},
        "test": {"accuracy": accuracy, f"exit_{depth}_accuracy": accuracy},
    }


def final_classifiers(model: HighwayMixin) -> list[nn.Linear]:
    """The linear layers that answer at the end: one, or the two of a distilled DeiT.

    Raises:
        ValueError: There is none.
    """
    found = [child for child in model.children() if isinstance(child, nn.Linear)]
    if not found:
        raise ValueError(f"{type(model).__name__} ends in no linear layer that could be fitted")
    return found


class ClassifierInputs:
    """A highway without exits as `fill_cache` reads it: of a state it keeps what the final classifiers are given.

    Args:
        model (`HighwayMixin`): Without exits, in `eval()` mode.
        classifiers (`list[nn.Linear]`): Its own.
    """

    def __init__(self, model: HighwayMixin, classifiers: Sequence[nn.Linear]):
        self.model, self.classifiers = model, classifiers
        self.device, self.dtype = model.device, model.dtype
        self.exits = [self]

    def segments(self) -> list[Segment]:
        """The whole backbone as one."""
        return self.model.segments()

    def tokens(self, state: State) -> Tokens:
        """What each classifier is given of a state, as prefix tokens `[B, classifiers, D]`; no patches."""
        given: list[Tensor] = []
        hooks = [
            each.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0])) for each in self.classifiers
        ]
        try:
            self.model.final(state)
        finally:
            for hook in hooks:
                hook.remove()
        features = torch.stack(given, dim=1)
        return Tokens(features[:, :0], (0, 0), features)

    def reduce(self, tokens: Tokens) -> Tensor:
        """`[B, classifiers, D]` of these tokens, as a head reduces its own."""
        return tokens.prefix


@torch.no_grad()
def _accuracy(model: HighwayMixin, dataset: Any) -> float:
    """Share of samples that the final classifier gets right."""
    right = 0
    for batch in tqdm(in_batches(dataset, 64), desc="test"):
        logits = model(to_model(batch["pixel_values"], model), early_exit=False).logits
        right += int((logits.argmax(-1).cpu() == batch["labels"]).sum())
    return right / len(dataset)

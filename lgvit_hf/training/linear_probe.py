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
from .run import save_trained

logger = logging.getLogger(__name__)

# strengths of the L2 penalty, of which the validation samples choose one
L2 = (1e-1, 1e-2, 1e-3, 1e-4)
MOST_ITERATIONS = 300


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
        `seconds`, the chosen `l2`, validation loss and accuracy with each strength under `strengths`, and `test`.

    Raises:
        ValueError: The model has exits, which answer for its present classifier, or no linear classifier.
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
    samples: Any = ConcatDataset([train_dataset, validation_dataset])
    with cache_folder(output, say) as folder, ExitStack() as stack:
        backbone: Any = model.base_model
        width = classifiers[0].in_features
        shape = TokenShape(0, (0, 0), width, reduced=len(classifiers))
        made_from = {"what": "features of the classifier", "checkpoint": backbone_digest(backbone)}
        cache = open_cache(folder, [shape], len(samples), num_labels, made_from)
        stack.enter_context(gone_if_it_fails(folder))
        say(f"{num_trained} images to fit the classifier on, {len(samples) - num_trained} to choose its L2 penalty")
        seen: Any = ClassifierInputs(model, classifiers)
        fill_cache(cache, seen, samples, range(len(samples)), progress=partial(tqdm, desc="backbone"))
        labels, features = cache.labels, cache.states(0).float()
        if labels is None:
            raise ValueError("labels: some images have none, and a classifier is fitted to them")
        check_labels(labels, num_labels)
        strengths: list[dict[str, float]] = []
        fits: list[list[tuple[Tensor, Tensor]]] = []
        for l2 in L2:
            start: Sequence[Any] = fits[-1] if fits else [None] * len(classifiers)
            fits.append(
                [
                    fit_linear(features[:num_trained, index], labels[:num_trained], num_labels, l2, start=before)
                    for index, before in enumerate(start)
                ]
            )
            logits = torch.stack(
                [F.linear(features[num_trained:, index], *fit) for index, fit in enumerate(fits[-1])]
            ).mean(0)
            loss = F.cross_entropy(logits, labels[num_trained:]).item()
            accuracy = (logits.argmax(-1) == labels[num_trained:]).float().mean().item()
            strengths.append({"l2": l2, "loss": loss, "accuracy": accuracy})
            say(f"L2 {l2:g}: {accuracy:.1%} right in validation, loss {loss:.3f}")
        best = min(range(len(L2)), key=lambda index: strengths[index]["loss"])
        with torch.no_grad():
            for classifier, (weight, bias) in zip(classifiers, fits[best], strict=True):
                classifier.weight.copy_(weight)
                classifier.bias.copy_(bias)
        accuracy = _accuracy(model, test_dataset)
        Path(output).mkdir(parents=True, exist_ok=True)
        save_trained(model, processor, Path(output))
    depth = model.config.num_blocks
    return {
        "seconds": time.perf_counter() - started,
        "l2": L2[best],
        "strengths": strengths,
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


def fit_linear(
    features: Tensor,
    labels: Tensor,
    num_labels: int,
    l2: float,
    *,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: the linear classifier with the least cross-entropy, on standardised features.

    Minimises `mean cross-entropy + l2 / 2 * |W|^2` by L-BFGS to its only optimum; it is then folded back, so that the
    result takes features as they are.

    Args:
        features (`Tensor`): `[N, D]`.
        labels (`Tensor`): `[N]` class numbers.
        num_labels (`int`): `C`.
        l2 (`float`): Strength of the penalty; the bias has none.
        start (`tuple[Tensor, Tensor]`, *optional*): An earlier result to begin with.

    Returns:
        `[C, D]` and `[C]`.

    Example:

        >>> features = torch.tensor([[0.0], [1.0], [3.0], [4.0]])
        >>> weight, bias = fit_linear(features, torch.tensor([0, 0, 1, 1]), 2, l2=0.01)
        >>> (features @ weight.T + bias).argmax(-1).tolist()
        [0, 0, 1, 1]
    """
    mean, deviation = features.mean(0), features.std(0, correction=0)
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    scaled = (features - mean) / deviation
    weight = features.new_zeros(num_labels, features.shape[1])
    bias = features.new_zeros(num_labels)
    if start is not None:
        weight, bias = start[0] * deviation, start[1] + start[0] @ mean
    weight.requires_grad_(True)
    bias.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MOST_ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(scaled, weight, bias), labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    folded = weight.detach() / deviation
    return folded, bias.detach() - folded @ mean


@torch.no_grad()
def _accuracy(model: HighwayMixin, dataset: Any) -> float:
    """Share of samples that the final classifier gets right."""
    right = 0
    for batch in tqdm(in_batches(dataset, 64), desc="test"):
        logits = model(to_model(batch["pixel_values"], model), early_exit=False).logits
        right += int((logits.argmax(-1).cpu() == batch["labels"]).sum())
    return right / len(dataset)

"""Exits trained from states on disk: the frozen backbone runs once, every epoch costs its heads alone.

Each exit is trained by itself. On a frozen backbone that gives what training all of them together gives (their
losses share no weight), only one exit's states need to be in memory, and a stopped run loses one exit's training.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import get_cosine_schedule_with_warmup

from ..data.batches import in_batches, to_model
from ..files import replace_file, write_json
from ..heads import ExitHead
from ..losses import distillation_loss
from ..modeling_highway import HighwayMixin
from ..segments import State, Tokens
from .linear_fit import fit_head, is_linear

# samples that pass through the backbone together, and that a stopped run loses at most
SAMPLES_AT_ONCE = 64
NO_LABEL = -100
# of an exit's training, by which `grow` takes two minutes for a ViT-S and 6,000 images; twice as many make shallow
# exits one or two points better
STEPS = 400


class Samples(Protocol):
    """Items `pixel_values` and, if known, `labels`: a list, or a dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


Progress = Callable[[Iterable], Iterable]


class OtherStates(ValueError):
    """A folder holds what another run, or somebody else, has left there."""


@dataclass(frozen=True)
class TokenShape:
    """What is kept of the tokens at one exit: those vectors that its head reduces them to, or all of them.

    Args:
        prefix (`int`): Prefix tokens.
        grid (`tuple[int, int]`): Of the patches after them.
        width (`int`): Channels of each.
        reduced (`int`, *optional*): Vectors that `ExitHead.reduce` gives; `None` where the head needs all tokens.
    """

    prefix: int
    grid: tuple[int, int]
    width: int
    reduced: int | None = None

    @property
    def of_sample(self) -> tuple[int, int]:
        """`(tokens, width)`."""
        return self.prefix + self.grid[0] * self.grid[1] if self.reduced is None else self.reduced, self.width

    def pack(self, head: ExitHead, tokens: Tokens) -> Tensor:
        """`[B, tokens, width]` of what a head needs, in half precision."""
        reduced = head.reduce(tokens)
        kept = torch.cat([tokens.prefix, tokens.patches], dim=1) if reduced is None else reduced
        # beyond the range of half precision lie only a few huge activations of large models
        return kept.clamp(-65504, 65504).half()

    def answer(self, head: ExitHead, packed: Tensor) -> Tensor:
        """Logits `[B, C]` of a head on what `pack` kept, in the head's precision."""
        if self.reduced is not None:
            return head.answer_reduced(packed)
        tokens = Tokens(packed[:, self.prefix :], self.grid, packed[:, : self.prefix])
        # in training the whole map goes through, as batch norm needs it
        return head(tokens)[0] if head.training else head.answer(tokens)


@torch.no_grad()
def token_shapes(model: HighwayMixin, pixels: Tensor) -> list[TokenShape]:
    """What is to be kept for each exit of a highway, seen on one batch of images `[B, C, H, W]`."""
    state, shapes = State({"pixel_values": to_model(pixels, model)}), []
    for segment, head in zip(model.segments(), cast(Iterable[ExitHead], model.exits), strict=False):
        state = segment.advance(state)
        tokens = model.tokens(state)
        prefix, width = tokens.prefix.shape[1:]
        reduced = head.reduce(tokens)
        shapes.append(TokenShape(prefix, tokens.grid, width, None if reduced is None else reduced.shape[1]))
    return shapes


def bytes_per_image(shapes: Sequence[TokenShape], num_labels: int) -> int:
    """Bytes on disk of one image's states, in half precision, and of its logits and label.

    Example:

        >>> bytes_per_image([TokenShape(prefix=1, grid=(2, 2), width=8)], num_labels=3)
        100
    """
    return 2 * sum(tokens * width for tokens, width in (shape.of_sample for shape in shapes)) + 4 * num_labels + 8


@dataclass(frozen=True)
class StateCache:
    """Every exit's tokens, the full model's logits, and the labels of some images, as memory-mapped `.npy` files.

    Args:
        folder (`Path`): Holds `states-{exit}.npy` `[N, tokens, width]` float16, `logits.npy` `[N, C]` float32,
            `labels.npy` `[N]` int64 (-100: unknown), `progress.json`, and the trained heads.
        shapes (`list[TokenShape]`): Of each exit.
        num_samples (`int`): `N`.
        num_labels (`int`): `C`.
    """

    folder: Path
    shapes: list[TokenShape]
    num_samples: int
    num_labels: int

    def open(self, name: str) -> np.memmap:
        """One of the arrays; made when it is not there."""
        file, (dtype, shape) = self.folder / f"{name}.npy", self._arrays()[name]
        if not file.exists():
            with replace_file(file) as new:
                np.lib.format.open_memmap(new, "w+", dtype, (self.num_samples, *shape)).flush()
        return np.load(file, mmap_mode="r+")

    def states(self, exit_index: int) -> Tensor:
        """`[N, tokens, width]` float16 of one exit, not read before it is used."""
        return torch.from_numpy(self.open(f"states-{exit_index}"))

    @property
    def logits(self) -> Tensor:
        """`[N, C]` of the full model."""
        return torch.from_numpy(self.open("logits"))

    @property
    def labels(self) -> Tensor | None:
        """`[N]`, or `None` where some are unknown."""
        labels = torch.from_numpy(np.array(self.open("labels")))
        return None if (labels == NO_LABEL).any() else labels

    def _arrays(self) -> dict[str, tuple[type, tuple[int, ...]]]:
        states = {f"states-{index}": (np.float16, shape.of_sample) for index, shape in enumerate(self.shapes)}
        return {**states, "logits": (np.float32, (self.num_labels,)), "labels": (np.int64, ())}


def open_cache(
    folder: str | Path, shapes: list[TokenShape], num_samples: int, num_labels: int, made_from: dict[str, Any]
) -> StateCache:
    """A cache in `folder`: a new one, or the one that a stopped run with the same `made_from` left there.

    Raises:
        ValueError: What is there was made from something else.
        OSError: Too little is free on the disk.
    """
    folder, cache_file = Path(folder), Path(folder) / "made_from.json"
    made_from = {**made_from, "rows": num_samples, "shapes": list(map(asdict, shapes))}
    made_from = json.loads(json.dumps(made_from))  # lists for tuples, as it is read back
    if cache_file.exists():
        earlier = json.loads(cache_file.read_text(encoding="utf-8"))
        differing = [name for name in {**made_from, **earlier} if made_from.get(name) != earlier.get(name)]
        if differing:
            raise OtherStates(
                f"{folder} holds the states of a stopped run with other {', '.join(differing)}; "
                "repeat that run to finish it, or delete the folder to start anew"
            )
    else:
        if folder.exists() and any(folder.iterdir()):
            raise OtherStates(f"{folder} is to hold cached states, but other files are there; move them away")
        folder.mkdir(parents=True, exist_ok=True)
        needed, free = num_samples * bytes_per_image(shapes, num_labels), shutil.disk_usage(folder).free
        if needed > free:
            folder.rmdir()
            raise OSError(
                f"{folder}: the states of {num_samples} images take {needed / 1e9:.1f} GB, the disk has "
                f"{free / 1e9:.1f} GB left; take fewer images or fewer exits"
            )
        write_json(cache_file, made_from)
    return StateCache(folder, shapes, num_samples, num_labels)


@torch.no_grad()
def fill_cache(
    cache: StateCache, model: HighwayMixin, dataset: Samples, indices: Sequence[int], *, progress: Progress = iter
) -> None:
    """Run the frozen backbone once on some samples and keep the features for its exits, or go on where a run stopped.

    Args:
        cache (`StateCache`): To fill.
        model (`HighwayMixin`): A highway, in `eval()` mode; its exits are not run.
        dataset (`Samples`): Items `pixel_values` and, if known, `labels`.
        indices (`Sequence[int]`): Which samples, in the order of the cache.
        progress (callable, *optional*): Wraps the batches, to show progress.

    Raises:
        ValueError: An image that a stopped run has cached is not what it was.
    """
    file = cache.folder / "progress.json"
    digests = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    arrays = {name: cache.open(name) for name in cache._arrays()}
    segments = model.segments()
    batches = in_batches(Subset(cast(Dataset, dataset), indices), SAMPLES_AT_ONCE, collate=_stack)
    for number, (pixels, labels) in enumerate(progress(batches)):
        start = number * SAMPLES_AT_ONCE
        stop = start + len(pixels)
        digest = hashlib.sha256(pixels.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        if number < len(digests):
            if digest != digests[number]:
                raise OtherStates(
                    f"{cache.folder} holds the states of a stopped run with other images or labels; "
                    "repeat that run to finish it, or delete the folder to start anew"
                )
            continue
        state = State({"pixel_values": to_model(pixels, model)})
        for index, segment in enumerate(segments):
            state = segment.advance(state)
            if index < len(cache.shapes):
                head = cast(ExitHead, model.exits[index])
                kept = cache.shapes[index].pack(head, model.tokens(state))
                arrays[f"states-{index}"][start:stop] = kept.cpu().numpy()
        arrays["logits"][start:stop] = segments[-1].answer(state).float().cpu().numpy()
        arrays["labels"][start:stop] = labels.numpy()
        for array in arrays.values():
            array.flush()
        digests.append(digest)
        write_json(file, digests)


def _stack(items: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    pixels = torch.stack([torch.as_tensor(item["pixel_values"]) for item in items])
    return pixels, torch.tensor([int(item.get("labels", NO_LABEL)) for item in items])


@dataclass(frozen=True)
class HeadTraining:
    """How an exit is trained from the cache, by distillation from the full model alone: AdamW, warm-up and cosine.

    Heads that are linear in a few vectors (`concat`, `average`) take the temperature alone: they are fitted to the
    optimum, see `fit_head`.

    Args:
        epochs (`int`, *optional*):
            Passes over the images; by default as many as make `STEPS` steps, from 5 to 20: what an exit learns depends
            on its steps, and more images need fewer passes.
        learning_rate (`float`, *optional*, defaults to 3e-3): After the warm-up, the first tenth.
        batch_size (`int`, *optional*, defaults to 64): Images at a time.
        weight_decay (`float`, *optional*, defaults to 0.05): Of AdamW.
        temperature (`float`, *optional*, defaults to 1.0):
            Softens the predictions; at 1 the exit learns the full model's confidence, as its threshold assumes.
    """

    epochs: int | None = None
    learning_rate: float = 3e-3
    batch_size: int = 64
    weight_decay: float = 0.05
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "batch_size", "temperature"):
            value = getattr(self, name)
            if not (value is None and name == "epochs") and not 0 < value < math.inf:
                raise ValueError(f"{name}: {value!r} must be above 0, and finite")
        for name in ("epochs", "batch_size"):
            if (getattr(self, name) or 0) % 1:
                raise ValueError(f"{name}: {getattr(self, name)!r} must be a whole number")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: {self.weight_decay!r} must be at least 0, and finite")

    def epochs_for(self, num_samples: int) -> int:
        """Passes over `num_samples` images.

        Example:

            >>> [HeadTraining().epochs_for(images) for images in (500, 2000, 50000)]
            [20, 13, 5]
        """
        return self.epochs or min(20, max(5, round(STEPS * self.batch_size / num_samples)))


def train_exits(
    model: HighwayMixin,
    cache: StateCache,
    num_samples: int,
    how: HeadTraining,
    seed: int = 0,
    progress: Progress = iter,
) -> None:
    """Train every exit of a highway on the first samples of a full cache; finished ones are read from there.

    Args:
        model (`HighwayMixin`): The highway whose exits are trained, in place; left in `eval()` mode.
        cache (`StateCache`): Filled by `fill_cache`.
        num_samples (`int`): How many; those after them are not used.
        how (`HeadTraining`): Epochs, learning rate and so on.
        seed (`int`, *optional*, defaults to 0): Of batches and dropout, the same for each exit.
        progress (callable, *optional*): Wraps the exits, to show progress.
    """
    made_with = {"training": json.dumps({**asdict(how), "rows": num_samples, "seed": seed})}
    for index, head in enumerate(progress(model.exits)):
        file = cache.folder / f"head-{index}.safetensors"
        if not file.exists() or _trained_with(file) != made_with:
            torch.manual_seed(seed)
            head.float()
            train_head(head, cache.states(index)[:num_samples], cache.logits[:num_samples], cache.shapes[index], how)
            weights = {name: tensor.cpu().contiguous() for name, tensor in head.state_dict().items()}
            with replace_file(file) as new:
                save_file(weights, new, metadata=made_with)
        head.load_state_dict(load_file(file))
        head.to(model.dtype).eval()


def _trained_with(file: Path) -> dict[str, str]:
    """How a stored head was trained."""
    with safe_open(file, "pt") as stored:
        return stored.metadata()


def train_head(head: ExitHead, states: Tensor, teacher: Tensor, shape: TokenShape, how: HeadTraining) -> None:
    """Distil the full model's answers into one exit.

    Args:
        head (`ExitHead`): In single precision; trained in place, on its own device.
        states (`Tensor`): `[N, tokens, width]`, the exit's features, in random order.
        teacher (`Tensor`): `[N, C]`, the full model's logits.
        shape (`TokenShape`): Of the states.
        how (`HeadTraining`): Epochs, learning rate and so on.
    """
    if shape.reduced is not None and is_linear(head):
        fit_head(head, states, teacher, how.temperature)
        return
    batch_size = max(1, min(how.batch_size, len(states) // 4))
    optimizer = torch.optim.AdamW(head.parameters(), lr=how.learning_rate, weight_decay=how.weight_decay)
    epochs = how.epochs_for(len(states))
    steps = epochs * batches_per_epoch(len(states), batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    head.train()
    for _ in range(epochs):
        run_epoch(head, states, teacher, shape, batch_size, how.temperature, step)
    head.eval()


def run_epoch(
    head: ExitHead,
    states: Tensor,
    teacher: Tensor,
    shape: TokenShape,
    batch_size: int,
    temperature: float,
    step: Callable[[], None],
) -> None:
    """One pass over the states; `step` is called with the gradients of each batch. Other arguments as `train_head`."""
    device = next(head.parameters()).device
    # one buffer for all batches: fresh memory for each would cost more than the copy
    batch = torch.empty(batch_size, *shape.of_sample, device=device)
    for part in shuffled_slices(len(states), batch_size):
        logits = shape.answer(head, batch.copy_(states[part]))
        distillation_loss(logits, teacher[part].to(device), temperature).backward()
        step()


def batches_per_epoch(num_samples: int, batch_size: int) -> int:
    """How many slices `shuffled_slices` gives."""
    return max(1, num_samples // batch_size - 1)


def shuffled_slices(num_samples: int, batch_size: int) -> Iterator[slice]:
    """The samples once, in stretches that begin at another sample each time and come in random order.

    A stretch of a memory map is read in one go and not copied. Up to two batches at the ends are left out.

    Example:

        >>> [stretch.stop - stretch.start for stretch in shuffled_slices(10, 3)]
        [3, 3]
    """
    count = batches_per_epoch(num_samples, batch_size)
    first = int(torch.randint(num_samples - count * batch_size + 1, ()))
    for number in torch.randperm(count).tolist():
        start = first + number * batch_size
        yield slice(start, start + batch_size)


@torch.no_grad()
def exit_logits(model: HighwayMixin, cache: StateCache, start: int) -> Tensor:
    """What every exit of a highway, and the full model, answer to cached samples from `start` on: `[E + 1, N, C]`."""
    answers = []
    for index, head in enumerate(cast(Iterable[ExitHead], model.exits)):
        like, shape = next(head.parameters()), cache.shapes[index]
        batches = cache.states(index)[start:].split(SAMPLES_AT_ONCE)
        logits = (shape.answer(head, batch.to(like.device, like.dtype)) for batch in batches)
        answers.append(torch.cat([each.float().cpu() for each in logits]))
    return torch.stack([*answers, cache.logits[start:].clone()])

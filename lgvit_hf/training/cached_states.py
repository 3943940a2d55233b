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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from ..data.batches import in_batches, to_model
from ..files import write_json
from ..heads import ExitHead
from ..losses import distillation_loss
from ..segments import State, Tokens

# rows that pass through the backbone together, and that a stopped run loses at most
ROWS_AT_ONCE = 64
NO_LABEL = -100
# of an exit's training; on 5,100 images of CIFAR-10, 20 passes instead of these 11 made exits 0.3 points better
STEPS = 900


class OtherStates(ValueError):
    """A folder holds what another run, or somebody else, has left there."""


@dataclass(frozen=True)
class TokenShape:
    """What is kept of the tokens at one exit: `prefix` tokens, then the patches of `grid`, each of `width` channels.

    Patches that the head does not read are not kept.
    """

    prefix: int
    grid: tuple[int, int]
    width: int
    keeps_patches: bool

    @property
    def of_row(self) -> tuple[int, int]:
        """`(tokens, width)`."""
        patches = self.grid[0] * self.grid[1] if self.keeps_patches else 0
        return self.prefix + patches, self.width

    def pack(self, tokens: Tokens) -> Tensor:
        """`[B, tokens, width]` of what an exit reads, in half precision."""
        kept = torch.cat([tokens.prefix, tokens.patches], dim=1) if self.keeps_patches else tokens.prefix
        # beyond the range of half precision lie only a few huge activations of large models
        return kept.clamp(-65504, 65504).half()

    def unpack(self, packed: Tensor) -> Tokens:
        """What `pack` kept, in single precision."""
        packed = packed.float()
        return Tokens(packed[:, self.prefix :], self.grid, packed[:, : self.prefix])


@torch.no_grad()
def token_shapes(model: PreTrainedModel, pixels: Tensor) -> list[TokenShape]:
    """What is to be kept for each exit of a highway, seen on one batch of images `[B, C, H, W]`."""
    state, shapes = State({"pixel_values": to_model(pixels, model)}), []
    for segment, head in zip(model.segments(), model.exits, strict=False):
        state = segment.advance(state)
        tokens = model.tokens(state)
        prefix, width = tokens.prefix.shape[1:]
        shapes.append(TokenShape(prefix, tokens.grid, width, _reads_patches(head, tokens)))
    return shapes


def _reads_patches(head: ExitHead, tokens: Tokens) -> bool:
    """Whether unknown patches make an unknown answer."""
    unknown = Tokens(torch.full_like(tokens.patches, torch.nan), tokens.grid, tokens.prefix)
    return bool(head.answer(unknown).isnan().any())


def bytes_per_image(shapes: Sequence[TokenShape], num_labels: int) -> int:
    """Bytes on disk of one image's states, in half precision, and of its logits and label.

    Example:

        >>> bytes_per_image([TokenShape(prefix=1, grid=(2, 2), width=8, keeps_patches=True)], num_labels=3)
        100
    """
    return 2 * sum(tokens * width for tokens, width in (shape.of_row for shape in shapes)) + 4 * num_labels + 8


@dataclass(frozen=True)
class StateCache:
    """Every exit's tokens, the full model's logits, and the labels of some images, as memory-mapped `.npy` files.

    Args:
        folder (`Path`): Holds `states-{exit}.npy` `[N, tokens, width]` float16, `logits.npy` `[N, C]` float32,
            `labels.npy` `[N]` int64 (-100: unknown), `progress.json`, and the trained heads.
        shapes (`list[TokenShape]`): Of each exit.
        num_rows (`int`): `N`.
        num_labels (`int`): `C`.
    """

    folder: Path
    shapes: list[TokenShape]
    num_rows: int
    num_labels: int

    def open(self, name: str) -> np.memmap:
        """One of the arrays; made when it is not there."""
        file, (dtype, shape) = self.folder / f"{name}.npy", self._arrays()[name]
        if not file.exists():
            # a name of its own until the header is written
            new = file.with_suffix(".new")
            np.lib.format.open_memmap(new, "w+", dtype, (self.num_rows, *shape)).flush()
            new.replace(file)
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
        states = {f"states-{index}": (np.float16, shape.of_row) for index, shape in enumerate(self.shapes)}
        return {**states, "logits": (np.float32, (self.num_labels,)), "labels": (np.int64, ())}


def open_cache(
    folder: str | Path, shapes: list[TokenShape], num_rows: int, num_labels: int, made_from: dict[str, Any]
) -> StateCache:
    """A cache in `folder`: a new one, or the one that a stopped run with the same `made_from` left there.

    Raises:
        ValueError: What is there was made from something else.
        OSError: The disk has too little room.
    """
    folder, cache_file = Path(folder), Path(folder) / "made_from.json"
    made_from = json.loads(json.dumps({**made_from, "rows": num_rows, "shapes": [asdict(shape) for shape in shapes]}))
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
        needed, free = num_rows * bytes_per_image(shapes, num_labels), shutil.disk_usage(folder).free
        if needed > free:
            folder.rmdir()
            raise OSError(
                f"{folder}: the states of {num_rows} images take {needed / 1e9:.1f} GB, the disk has "
                f"{free / 1e9:.1f} GB left; take fewer images or fewer exits"
            )
        write_json(cache_file, made_from)
    return StateCache(folder, shapes, num_rows, num_labels)


@torch.no_grad()
def fill_cache(
    cache: StateCache,
    model: PreTrainedModel,
    dataset: Dataset,
    rows: Sequence[int],
    *,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Run the frozen backbone once on some rows of a dataset and keep what exits read, or go on where a run stopped.

    Args:
        cache (`StateCache`): To fill.
        model (`PreTrainedModel`): A highway, in `eval()` mode; its exits are not run.
        dataset (`Dataset`): Items `pixel_values` and, if known, `labels`.
        rows (`Sequence[int]`): Which rows, in the order of the cache.
        progress (callable, *optional*): Wraps the batches, to show progress.

    Raises:
        ValueError: An image that a stopped run has cached is not what it was.
    """
    file = cache.folder / "progress.json"
    digests = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    arrays = {name: cache.open(name) for name in cache._arrays()}
    segments = model.segments()
    batches = in_batches(Subset(dataset, rows), ROWS_AT_ONCE, collate=_stack)
    for number, (pixels, labels) in enumerate(progress(batches)):
        start = number * ROWS_AT_ONCE
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
                arrays[f"states-{index}"][start:stop] = cache.shapes[index].pack(model.tokens(state)).cpu().numpy()
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
    """How an exit is trained from the cache: AdamW, warm-up and cosine, distillation from the full model alone.

    Args:
        epochs (`int`, *optional*):
            Passes over the images; by default as many as make `STEPS` steps, from 5 to 20: what an exit learns depends
            on its steps, and more images need fewer passes.
        learning_rate (`float`, *optional*, defaults to 3e-3): After the warm-up, the first tenth.
        batch_size (`int`, *optional*, defaults to 64): Images at a time.
        weight_decay (`float`, *optional*, defaults to 0.05): Of AdamW.
        temperature (`float`, *optional*, defaults to 1.0):
            Softens the predictions; at 1 the exit learns to be as sure as the full model is, as its threshold assumes.
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

    def epochs_for(self, num_rows: int) -> int:
        """Passes over `num_rows` images.

        Example:

            >>> [HeadTraining().epochs_for(rows) for rows in (500, 5000, 50000)]
            [20, 12, 5]
        """
        return self.epochs or min(20, max(5, round(STEPS * self.batch_size / num_rows)))


def train_exits(
    model: PreTrainedModel,
    cache: StateCache,
    num_rows: int,
    how: HeadTraining,
    *,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Train every exit of a highway on the first `num_rows` rows of a full cache; finished ones are read from there.

    Args:
        model (`PreTrainedModel`): The highway whose exits are trained, in place; left in `eval()` mode.
        cache (`StateCache`): Filled by `fill_cache`.
        num_rows (`int`): The rows behind these are not looked at.
        how (`HeadTraining`): Epochs, learning rate and so on.
        seed (`int`, *optional*, defaults to 0): Of batches and dropout, the same for each exit.
        progress (callable, *optional*): Wraps the exits, to show progress.
    """
    made_with = {"training": json.dumps({**asdict(how), "rows": num_rows, "seed": seed})}
    for index, head in enumerate(progress(model.exits)):
        file = cache.folder / f"head-{index}.safetensors"
        weights = _read_head(file, made_with)
        if weights is None:
            torch.manual_seed(seed)
            head.float()
            train_head(head, cache.states(index)[:num_rows], cache.logits[:num_rows], cache.shapes[index], how)
            weights = {name: tensor.cpu().contiguous() for name, tensor in head.state_dict().items()}
            save_file(weights, file.with_suffix(".new"), metadata=made_with)
            file.with_suffix(".new").replace(file)
        head.load_state_dict(weights)
        head.to(model.dtype).eval()


def _read_head(file: Path, made_with: dict[str, str]) -> dict[str, Tensor] | None:
    """The weights of a head that was trained in the same way, if there is one."""
    if not file.exists():
        return None
    with safe_open(file, "pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()} if stored.metadata() == made_with else None


def train_head(head: ExitHead, states: Tensor, teacher: Tensor, shape: TokenShape, how: HeadTraining) -> None:
    """Distil the full model's answers into one exit.

    Args:
        head (`ExitHead`): In single precision; trained in place, on its own device.
        states (`Tensor`): `[N, tokens, width]`, what the exit reads, in random order.
        teacher (`Tensor`): `[N, C]`, the full model's logits.
        shape (`TokenShape`): Of the states.
        how (`HeadTraining`): Epochs, learning rate and so on.
    """
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
    batch = torch.empty(batch_size, *shape.of_row, device=device)
    for rows in shuffled_slices(len(states), batch_size):
        logits, _ = head(shape.unpack(batch.copy_(states[rows])))
        distillation_loss(logits, teacher[rows].to(device), temperature).backward()
        step()


def batches_per_epoch(num_rows: int, batch_size: int) -> int:
    """How many slices `shuffled_slices` gives."""
    return max(1, num_rows // batch_size - 1)


def shuffled_slices(num_rows: int, batch_size: int) -> Iterator[slice]:
    """The rows once, in stretches that begin at another row each time and come in random order.

    A stretch of a memory map is read in one go and not copied. Up to two batches of rows at the ends are left out.

    Example:

        >>> [stretch.stop - stretch.start for stretch in shuffled_slices(10, 3)]
        [3, 3]
    """
    count = batches_per_epoch(num_rows, batch_size)
    first = int(torch.randint(num_rows - count * batch_size + 1, ()))
    for number in torch.randperm(count).tolist():
        start = first + number * batch_size
        yield slice(start, start + batch_size)


@torch.no_grad()
def exit_logits(model: PreTrainedModel, cache: StateCache, rows: slice) -> Tensor:
    """What every exit of a highway, and the full model, say of cached rows: `[E + 1, N, C]` float32."""
    answers = []
    for index, head in enumerate(model.exits):
        head.eval()
        dtype, device = head.classifiers[0].weight.dtype, head.classifiers[0].weight.device
        read = partial(_as_tokens, cache.shapes[index], dtype=dtype, device=device)
        answers.append(
            torch.cat(
                [head.answer(read(part)).float().cpu() for part in cache.states(index)[rows].split(ROWS_AT_ONCE)]
            )
        )
    return torch.stack([*answers, cache.logits[rows].clone()])


def _as_tokens(shape: TokenShape, packed: Tensor, *, dtype: torch.dtype, device: torch.device) -> Tokens:
    tokens = shape.unpack(packed.to(device))
    return Tokens(tokens.patches.to(dtype), tokens.grid, tokens.prefix.to(dtype))

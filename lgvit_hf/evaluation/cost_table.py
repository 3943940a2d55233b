"""CostTable: measured time of each part of a highway at several batch sizes, and what latency it predicts."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from scipy.stats import binom
from torch import Tensor
from transformers import PreTrainedModel

from ..data.batches import to_model
from ..data.devices import device_name
from ..files import write_json
from ..hub.report_keys import current_names
from ..modes import evaluating
from ..policies import ConfidencePolicy, ExitPolicy
from ..segments import Segment, State, height_width
from .costs import Costs, Highway, export_of
from .environment import processor_name
from .timing import PartTimes, time_interleaved, time_parts


@dataclass(frozen=True)
class CostTable:
    """Wall-clock of each part of a highway at several batch sizes, each number a median over repeats.

    Args:
        batch_sizes (`list[int]`): Ascending. Between two of them times are interpolated linearly; no samples, no time.
        backbone_costs (`list[list[float]]`):
            Seconds of each segment's blocks at each batch size, `[segment][batch size]`, the stem in the first. Of an
            exported highway, with the head, which is in one file with them and always run.
        heads (`list[list[float]]`):
            Likewise of each segment's exit: its head, the policy, and the wait for how many samples exit; last, the
            final classifier and writing down its answers. Of an exported highway, without the head itself.
        select (`list[list[float]]`):
            Likewise of letting some samples exit at an exit and carrying the others on; paid where neither none nor
            all exit. 0 after the final classifier.
        threads (`int`): Of the processor.
        device (`str`): What it was measured on.
        model (`str`): What was measured, as `architecture` says it.

    Raises:
        ValueError: The batch sizes do not ascend from at least 1, or a part does not have one time for each.

    Example:

        >>> table = CostTable(
        ...     batch_sizes=[1, 8],
        ...     backbone_costs=[[0.004, 0.016], [0.004, 0.016]],
        ...     heads=[[0.001, 0.002], [0.001, 0.002]],
        ...     select=[[0.0, 0.0], [0.0, 0.0]],
        ...     threads=1,
        ...     device="cpu",
        ...     model="an example",
        ... )
        >>> table.at(8).backbone_costs, table.mean_latency([0.5, 0.5], evaluated=[0], batch_size=1)
        ([2.0, 2.0], 7.5)
    """

    batch_sizes: list[int]
    backbone_costs: list[list[float]]
    heads: list[list[float]]
    select: list[list[float]]
    threads: int
    device: str
    model: str

    def __post_init__(self) -> None:
        sizes = self.batch_sizes
        if not sizes or sizes[0] < 1 or any(low >= high for low, high in zip(sizes, sizes[1:], strict=False)):
            raise ValueError(f"batch_sizes={sizes} must ascend from at least 1")
        for name in ("backbone_costs", "heads", "select"):
            times = getattr(self, name)
            if len(times) != len(self.backbone_costs) or any(len(row) != len(sizes) for row in times):
                raise ValueError(
                    f"{name} must hold {len(self.backbone_costs)} segments' times at the {len(sizes)} batch sizes "
                    f"{sizes}, but holds {[len(row) for row in times]}"
                )
            if not all(0 <= seconds < math.inf for row in times for seconds in row):
                raise ValueError(f"{name} must hold seconds, from 0: {times}")

    def check(self, num_exits: int, model: str | None = None) -> None:
        """Raise `ValueError` if the table is of another model.

        Args:
            num_exits (`int`): Classifiers that the model has, the final one counted.
            model (`str`, *optional*): As `architecture` says it.
        """
        if num_exits != len(self.backbone_costs):
            what = f"{len(self.backbone_costs)} exits, the final classifier counted, but the model has {num_exits}"
        elif model not in (None, self.model):
            what = f"{self.model}, not of {model}"
        else:
            return
        raise ValueError(f"the cost table is of {what}; measure this one with `lgvit benchmark --cost-table FILE`")

    def at(self, batch_size: int) -> Costs:
        """Milliseconds per image in each part when the whole batch stays to the end."""
        times = self._by_samples(batch_size)[:2, :, batch_size] * 1e3 / batch_size
        return Costs(*times.tolist())

    def mean_latency(self, shares: Sequence[float], evaluated: Sequence[int], batch_size: int) -> float:
        """Expected milliseconds per image of a batch, of which fewer and fewer samples go on.

        Samples exit independently of one another, so that the number left at a segment is binomial; its time is
        averaged over that number. Letting samples exit is paid where some exit and some do not.

        Args:
            shares (`Sequence[float]`): Of the samples that exit at each exit, the final classifier last; they sum to
                1.
            evaluated (`Sequence[int]`): Exits whose heads are run, by index from 0; the final classifier always is.
            batch_size (`int`): At most the largest measured.

        Raises:
            ValueError: `batch_size` was not measured, or there are not as many shares as exits.
        """
        if len(shares) != len(self.backbone_costs):
            raise ValueError(f"{len(shares)} shares, but the cost table is of {len(self.backbone_costs)} exits")
        backbone_costs, heads, select = self._by_samples(batch_size)
        last, seconds = len(shares) - 1, 0.0
        samples = np.arange(batch_size + 1)
        for index, exiting in enumerate(shares):
            reached = sum(shares[index:])
            if reached <= 0:
                break
            chances = binom.pmf(samples, batch_size, min(1.0, reached))
            seconds += float(chances @ backbone_costs[index])
            if index in evaluated or index == last:
                seconds += float(chances @ heads[index])
            if index in evaluated and index != last:
                share = min(1.0, exiting / reached)
                some = 1 - share**samples - (1 - share) ** samples
                seconds += float((chances * some)[1:] @ select[index][1:])
        return seconds * 1e3 / batch_size

    def _by_samples(self, batch_size: int) -> np.ndarray:
        """Seconds of `backbone_costs`, `heads` and `select` of 0 to `batch_size` samples, `[3, segment, samples]`."""
        if not 1 <= batch_size <= self.batch_sizes[-1]:
            raise ValueError(
                f"batch_size={batch_size} is outside the cost table's 1 to {self.batch_sizes[-1]}; measure it with "
                f"`lgvit benchmark --batch-sizes {batch_size}`"
            )
        samples, known = np.arange(batch_size + 1), [0, *self.batch_sizes]
        parts = np.array([self.backbone_costs, self.heads, self.select])
        return np.apply_along_axis(lambda times: np.interp(samples, known, [0.0, *times]), -1, parts)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON takes it; `CostTable(**settings)` is the way back."""
        return asdict(self)

    def save(self, file: str | Path) -> None:
        """Write the table as JSON, all of it or nothing."""
        write_json(file, self.to_dict())

    @classmethod
    def load(cls, file: str | Path, *, num_exits: int | None = None, model: str | None = None) -> CostTable:
        """Read what `save` wrote.

        Args:
            file (`str` or `Path`): The JSON file.
            num_exits (`int`, *optional*), model (`str`, *optional*): Of the model it must fit, as of `check`.

        Raises:
            ValueError: The file is no cost table, its parts do not fit together, or it is of another model.
        """
        try:
            table = cls(**current_names(json.loads(Path(file).read_text(encoding="utf-8"))))
        except (AttributeError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is not a cost table as CostTable.save writes it ({error})") from error
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        table.check(len(table.backbone_costs) if num_exits is None else num_exits, model)
        return table


# -- measuring -------------------------------------------------------------------------------------------------


def cost_table(model: Highway, walks: Mapping[int, Sequence[PartTimes]]) -> CostTable:
    """The table of medians of several walks at each batch size, brought to add up to the whole walks' median.

    On a busy machine an interruption hits few of the parts, and so no part's median, but most of the walks.
    """
    sizes = sorted(walks)
    paces = {size: _pace(walks[size]) for size in sizes}

    def medians(part: Callable[[PartTimes], list[float]]) -> list[list[float]]:
        times = [paces[size] * np.median([part(walk) for walk in walks[size]], axis=0) for size in sizes]
        table: list[list[float]] = np.array(times).T.tolist()
        return table

    return CostTable(
        batch_sizes=sizes,
        backbone_costs=medians(PartTimes.backbone_costs),
        heads=medians(lambda walk: walk.heads),
        select=medians(lambda walk: walk.select),
        threads=threads_of(model),
        device=device_name(model.device),
        model=architecture(model),
    )


def _pace(walks: Sequence[PartTimes]) -> float:
    parts = np.median([[*walk.backbone_costs(), *walk.heads, *walk.select] for walk in walks], axis=0)
    return statistics.median(walk.total for walk in walks) / float(parts.sum())


@torch.no_grad()
def measure_cost_table(
    model: Highway, pixels: Tensor, batch_sizes: Sequence[int] = (1, 8, 32), *, repeats: int = 15
) -> CostTable:
    """Time each part of a highway at several batch sizes, in turn, with the device and threads that are set.

    Args:
        model (`Highway`): Of PyTorch, or an exported one of the layout `segments`; run in `eval()` mode.
        pixels (`Tensor`): `[B, C, H, W]`, at least as many images as the largest batch; their content does not matter.
        batch_sizes (`Sequence[int]`, *optional*, defaults to `(1, 8, 32)`):
            The powers of two below the largest are measured too, since fewer and fewer samples of a batch go on.
        repeats (`int`, *optional*, defaults to 15): Walks at each batch size, after two to warm up.

    Raises:
        ValueError: A batch size is below 1 or above the number of images, or the model is exported in another layout.

    Example:

        >>> from lgvit_hf import ViTHighway, ViTHighwayConfig
        >>> config = ViTHighwayConfig(image_size=32, num_hidden_layers=3, hidden_size=24, intermediate_size=24)
        >>> table = measure_cost_table(ViTHighway(config), torch.zeros(2, 3, 32, 32), [2], repeats=1)
        >>> table.batch_sizes, len(table.backbone_costs) == len(config.exit_positions) + 1
        ([1, 2], True)
    """
    sizes = measured_sizes(batch_sizes, len(pixels))
    with evaluating(model):
        segments = timed_segments(model)
        return cost_table(model, time_walks(segments, model.answering_policy, to_model(pixels, model), sizes, repeats))


def measured_costs(model: Highway, pixels: Tensor, *, repeats: int = 15) -> Costs:
    """Wall-clock of each segment's blocks, and of evaluating its head and a policy, in units of the plain model's.

    The mean of two batch sizes: one image, where each operation of a head costs about as much as one of a block, and
    all of `pixels` `[B, C, H, W]`, where the arithmetic counts.
    """
    sizes, policy = sorted({1, len(pixels)}), ConfidencePolicy(threshold=1.0)
    table = cost_table(model, time_walks(model.segments(), policy, to_model(pixels, model), sizes, repeats))
    both = [table.at(size).relative() for size in sizes]
    backbone_costs = np.mean([costs.backbone_costs for costs in both], axis=0).tolist()
    return Costs(backbone_costs, np.mean([costs.heads for costs in both], axis=0).tolist())


@torch.no_grad()
def time_walks(
    segments: Sequence[Segment], policy: ExitPolicy, pixels: Tensor, batch_sizes: Sequence[int], repeats: int
) -> dict[int, list[PartTimes]]:
    """Walks through a highway at each batch size, in turn, after two to warm up."""
    walks: dict[int, list[PartTimes]] = {size: [] for size in batch_sizes}

    def walk(size: int) -> None:
        walks[size].append(time_parts(segments, State({"pixel_values": pixels[:size]}), policy))

    time_interleaved({str(size): partial(walk, size) for size in batch_sizes}, repeats=repeats)
    return {size: times[-repeats:] for size, times in walks.items()}


def measured_sizes(batch_sizes: Sequence[int], num_images: int) -> list[int]:
    """Batch sizes of a cost table: those asked for, and the powers of two below the largest of them.

    Raises:
        ValueError: None is asked for, or one is below 1 or above the number of images.

    Example:

        >>> measured_sizes([6], num_images=10)
        [1, 2, 4, 6]
    """
    if not batch_sizes or min(batch_sizes) < 1 or max(batch_sizes) > num_images:
        raise ValueError(
            f"batch_sizes={list(batch_sizes)} must be from 1 to the number of images, {num_images}; give more images "
            "or smaller batches"
        )
    return sorted({*batch_sizes, *(2**power for power in range(max(batch_sizes).bit_length()))})


def timed_segments(model: Highway) -> list[Segment]:
    """The segments of a highway that exits early.

    Raises:
        ValueError: It is exported in one file, which decides inside, or in one that runs every exit.
    """
    exported = export_of(model)
    if exported is not None and exported.layout == "all_exits":
        raise ValueError(
            "layout 'all_exits' runs every exit of every sample, which no policy makes faster; export with "
            "layout='segments' to see what each part takes"
        )
    return model.segments()


def threads_of(model: Highway) -> int:
    """How many threads of the processor a highway is run with."""
    exported = export_of(model)
    return torch.get_num_threads() if exported is None else exported.threads


def machine(model: Highway) -> dict[str, Any]:
    """On what, and with what, a highway is timed: `dtype`, `device`, `processor`, `threads` and versions."""
    runs_on = {"device": device_name(model.device), "processor": processor_name(), "threads": threads_of(model)}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"dtype": str(model.dtype).removeprefix("torch."), **runs_on, **versions}


def architecture(model: Highway) -> str:
    """What decides how long a highway takes, in a line; two models of one architecture may share a cost table."""
    config, exported = model.config, export_of(model)
    height, width = height_width(config.image_size)
    exits = ", ".join(f"{exit.after} {exit.head}" for exit in config.exits)
    if exported is None:
        extent = f"{cast(PreTrainedModel, model).num_parameters()} parameters"
        numbers = str(model.dtype).removeprefix("torch.")
    else:
        extent = f"{exported.file_bytes / 1e6:.1f} MB of ONNX, layout {exported.layout}"
        numbers = exported.precision
    return (
        f"{config.model_type}: {config.num_blocks} blocks, {extent}, {height} x {width} px, {numbers}, exits after "
        f"{exits or 'none'}"
    )

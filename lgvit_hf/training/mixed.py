"""Strategy `mixed`: the backbone alone, then exits on the frozen backbone, then both (https://arxiv.org/abs/2407.14320)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, get_scheduler

from .arguments import HighwayTrainingArguments

TEACHER_FILE = "teacher.safetensors"


def phase_borders(args: HighwayTrainingArguments, max_steps: int) -> tuple[int, int]:
    """The steps at which the exits begin, and at which backbone and exits begin together.

    Epochs are shares of `num_train_epochs`, so that a run cut short by `max_steps` has the same phases.

    Example:

        >>> epochs = dict(backbone_epochs=6, head_epochs=2, num_train_epochs=10)
        >>> args = HighwayTrainingArguments("out", strategy="mixed", **epochs, report_to=[])
        >>> phase_borders(args, max_steps=100)
        (60, 80)
    """
    backbone_epochs = args.backbone_epochs or 0.0
    ends = (backbone_epochs, backbone_epochs + args.head_epochs)
    first, second = (round(epochs / args.num_train_epochs * max_steps) for epochs in ends)
    return first, second


def phase_of(step: int, borders: tuple[int, int]) -> str:
    """`backbone`, `heads` or `joint`.

    Example:

        >>> [phase_of(step, (2, 4)) for step in (1, 2, 4)]
        ['backbone', 'heads', 'joint']
    """
    return "backbone" if step < borders[0] else "heads" if step < borders[1] else "joint"


def phase_schedule(optimizer: Optimizer, args: HighwayTrainingArguments, max_steps: int) -> LambdaLR:
    """The learning rates of a mixed run: `lr_scheduler_type` once in each phase, so that each converges.

    The warm-up takes at most half of a phase.

    Raises:
        ValueError: A schedule that does not follow from the step alone.
    """
    starts = (0, *phase_borders(args, max_steps))
    lengths = [max(1, end - start) for start, end in zip(starts, (*starts[1:], max_steps), strict=True)]
    factors, options = [], args.lr_scheduler_kwargs
    kwargs = None if isinstance(options, str) else options
    for length in lengths:
        one_phase = get_scheduler(
            args.lr_scheduler_type,
            optimizer=SGD([torch.zeros(1)], lr=args.learning_rate),
            num_warmup_steps=min(args.get_warmup_steps(length), length // 2),
            num_training_steps=length,
            scheduler_specific_kwargs=kwargs,
        )
        if not isinstance(one_phase, LambdaLR):
            name = SchedulerType(args.lr_scheduler_type).value
            raise ValueError(
                f"lr_scheduler_type: {name!r} cannot begin anew in each phase of strategy 'mixed'; choose cosine, "
                "linear or constant_with_warmup"
            )
        factors.append(one_phase.lr_lambdas[0])

    def factor(step: int) -> float:
        number = max(index for index, start in enumerate(starts) if step >= start or index == 0)
        return float(factors[number](step - starts[number]))

    return LambdaLR(optimizer, factor)


class MixedTraining:
    """What a mixed run remembers beside its step: the model before exits joined, and what is frozen meanwhile.

    Args:
        model (`nn.Module`): The highway, as it is before a launcher wraps it.
    """

    def __init__(self, model: nn.Module):
        self.teacher: Any = copy.deepcopy(model).requires_grad_(False).eval()
        self.has_teacher = False
        self._frozen: list[nn.Parameter] = []

    def enter(self, phase: str, model: nn.Module) -> None:
        """Freeze backbone and final classifier while exits are fitted; in the next phase they are trained again."""
        if phase != "heads":
            self.thaw()
        elif not self._frozen:
            named = model.named_parameters()
            self._frozen = [each for name, each in named if each.requires_grad and not name.startswith("exits.")]
            for parameter in self._frozen:
                parameter.requires_grad_(False)

    def thaw(self) -> None:
        """Train again what was frozen."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def take_teacher(self, model: nn.Module) -> None:
        """Keep the model as it is now, to hold up the final classifier."""
        self.teacher.load_state_dict(model.state_dict())
        self.has_teacher = True

    @torch.no_grad()
    def teacher_logits(self, pixel_values: Tensor, **inputs: Any) -> Tensor:
        """`[B, C]` of the final classifier before exits joined."""
        depth = self.teacher.config.num_blocks
        model = self.teacher.to(pixel_values.device)
        return model(pixel_values, early_exit=True, min_depth=depth, max_depth=depth, **inputs).logits

    def save(self, folder: str | Path) -> None:
        """Store the teacher, once there is one, in a checkpoint."""
        if self.has_teacher:
            tensors = {name: each for name, each in self.teacher.state_dict().items() if not name.startswith("exits.")}
            save_file({name: each.cpu().clone() for name, each in tensors.items()}, Path(folder) / TEACHER_FILE)

    def load(self, folder: str | Path) -> None:
        """Read the teacher of a checkpoint; those before the last phase have none."""
        file = Path(folder) / TEACHER_FILE
        self.has_teacher = file.is_file()
        if self.has_teacher:
            self.teacher.load_state_dict(load_file(file), strict=False)

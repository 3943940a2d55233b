"""Losses: tensors in, scalar out. No model, no config, no step counter.

Formulas: LGViT (https://arxiv.org/abs/2308.00255). Teachers are always detached.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


def task_loss(logits: Tensor, labels: Tensor, problem_type: str | None = None) -> Tensor:
    """The loss of one classifier, by transformers' `problem_type`, in float32.

    Args:
        logits (`Tensor`): `[B, C]`.
        labels (`Tensor`): `[B]` class numbers, `[B]` or `[B, C]` floats for regression, `[B, C]` for multi-label.
        problem_type (`str`, *optional*): Guessed as transformers does: one label is regression, integers are classes.

    Example:

        >>> task_loss(torch.zeros(1, 2), torch.tensor([1])).item()
        0.693...
    """
    if problem_type is None:
        if logits.shape[-1] == 1:
            problem_type = "regression"
        elif labels.is_floating_point():
            problem_type = "multi_label_classification"
    if problem_type == "regression":
        logits = logits.float().squeeze(-1)
        return F.mse_loss(logits, labels.float().view(logits.shape))
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
    return F.cross_entropy(logits.float(), labels.view(-1))


def check_labels(labels: Tensor, num_labels: int) -> None:
    """Raise `ValueError` where a class number is not from 0 to `num_labels - 1`; -100 is left out of a loss.

    Labels on an accelerator are not read back: that would stop it at every step.
    """
    if labels.device.type != "cpu" or labels.is_floating_point() or labels.dim() != 1 or num_labels < 2:
        return
    wrong = labels[((labels < 0) & (labels != -100)) | (labels >= num_labels)]
    if len(wrong):
        raise ValueError(f"labels: {wrong[0].item()} is outside 0..{num_labels - 1} (num_labels={num_labels})")


def loss_weights(weights: str | Sequence[float], positions: Sequence[int], num_blocks: int) -> list[float]:
    """The share of each exit in the training loss, the final classifier last: `"depth"`, `"uniform"` or a list.

    Example:

        >>> loss_weights("depth", [4, 8], 12)
        [4.0, 8.0, 12.0]
    """
    if weights == "depth":
        return [float(depth) for depth in (*positions, num_blocks)]
    if weights == "uniform":
        return [1.0] * (len(positions) + 1)
    return [float(weight) for weight in weights]


def weighted_loss(
    exit_logits: Sequence[Tensor], labels: Tensor, weights: Sequence[float], problem_type: str | None = None
) -> Tensor:
    """`sum_i w_i L_i / sum_i w_i` over the exits whose weight is not zero.

    Example:

        >>> logits, labels = torch.zeros(2, 3), torch.tensor([0, 1])
        >>> weighted_loss([logits, 5 * logits], labels, [1.0, 3.0]).item()
        1.098...
    """
    losses = [
        weight * task_loss(logits, labels, problem_type)
        for logits, weight in zip(exit_logits, weights, strict=True)
        if weight
    ]
    return torch.stack(losses).sum() / sum(weights)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """KL divergence of softened predictions, times `temperature ** 2`, averaged over samples and classes (as DeiT).

    Args:
        student (`Tensor`), teacher (`Tensor`): `[B, C]`.
        temperature (`float`, *optional*, defaults to 2.0): Divides both logits.

    Example:

        >>> z = torch.tensor([[1.0, 2.0]])
        >>> distillation_loss(z, z).item()
        0.0
    """
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.detach().float() / temperature, dim=-1)
    divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return divergence * temperature**2 / student.numel()


def heterogeneous_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence over the channels of two maps, summed over tokens, averaged over samples.

    Args:
        student (`Tensor`): `[B, N, D]`, an exit's feature map.
        teacher (`Tensor`): `[B, N, D]`, the backbone's last patches, aligned to it (`align_map`).
    """
    return _channel_divergence(student, *_channel_target(teacher))


@torch.no_grad()
def _channel_target(teacher: Tensor) -> tuple[Tensor, Tensor]:
    """`p_t` `[B, N, D]` and `sum p_t log p_t` `[B, N]` over the channels."""
    log_target = F.log_softmax(teacher.float(), dim=-1)
    target = log_target.exp()
    return target, (target * log_target).sum(-1)


def _channel_divergence(student: Tensor, target: Tensor, negative_entropy: Tensor) -> Tensor:
    student = student.float()
    # sum p_t (log p_t - log p_s) per token, without a log-softmax of the student to keep for the backward
    divergence = negative_entropy + student.logsumexp(-1) - (target * student).sum(-1)
    return divergence.sum() / len(student)


def local_homogeneous_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two local exits' maps `[B, N, D]`."""
    return F.mse_loss(student.float(), teacher.detach().float())


def global_homogeneous_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the channel Gram matrices `[B, D, D]` of two global exits' maps.

    The maps `[B, N, D]` may have different numbers of tokens. The matrices are never formed: with `S` and `T` of few
    tokens, `|S'S - T'T|^2 = |SS'|^2 + |TT'|^2 - 2 |ST'|^2` costs a fraction.
    """
    student, teacher = student.float(), teacher.detach().float()

    def squared_norm(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.transpose(1, 2)).square().sum()

    # a difference of large numbers: not in the half precision that autocast would choose
    with torch.autocast(student.device.type, enabled=False):
        difference = (
            squared_norm(student, student) + squared_norm(teacher, teacher) - 2 * squared_norm(student, teacher)
        )
    batch_size, _, width = student.shape
    return difference / (batch_size * width**2)


def align_map(patches: Tensor, grid: Grid, target_grid: Grid, target_width: int) -> Tensor:
    """Bring a map to another resolution and width, without parameters.

    Resolution: a coarser target takes every r-th patch of every r-th row, as LGViT's subsampled attention does; a
    finer one takes the nearest patch. Width: the mean of equal groups of neighbouring channels (or their repetition).
    On ViT and DeiT the width never differs and this is LGViT's published choice. On Swin, whose later stages are
    coarser and wider than the exits, no code was published and the choice is ours.

    Args:
        patches (`Tensor`): `[B, h * w, D]`.
        grid (`tuple`), target_grid (`tuple`): `(h, w)`.
        target_width (`int`): Channels wanted.

    Returns:
        `[B, target_h * target_w, target_width]`.

    Example:

        >>> align_map(torch.arange(9.0).view(1, 9, 1), (3, 3), (2, 2), 1).flatten().tolist()
        [0.0, 2.0, 6.0, 8.0]
    """
    narrow = patches.shape[-1] != target_width
    coarser = target_grid[0] * target_grid[1] < grid[0] * grid[1]
    # the two steps commute: whichever makes the map smaller comes first
    if narrow and not coarser:
        patches = F.adaptive_avg_pool1d(patches, target_width)
    if grid != target_grid:
        rows, columns = (
            _nearest(size, target, patches.device) for size, target in zip(grid, target_grid, strict=True)
        )
        patches = patches.index_select(1, (rows[:, None] * grid[1] + columns).flatten())
    if narrow and coarser:
        patches = F.adaptive_avg_pool1d(patches, target_width)
    return patches


def _nearest(size: int, target: int, device: torch.device) -> Tensor:
    """Which of `size` positions each of `target` positions takes."""
    stride = -(-size // target)
    positions = torch.arange(target, device=device)
    return positions * stride if size > target else positions * size // target


def map_grid(num_patches: int, grid: Grid) -> Grid:
    """The grid of a feature map that has `num_patches` tokens and was made from patches on `grid` by subsampling.

    Example:

        >>> map_grid(25, (14, 14)), map_grid(196, (14, 14))
        ((5, 5), (14, 14))
    """
    for ratio in range(1, max(grid) + 1):
        candidate = (-(-grid[0] // ratio), -(-grid[1] // ratio))
        if candidate[0] * candidate[1] == num_patches:
            return candidate
    raise ValueError(f"a map of {num_patches} tokens is no subsampling of the grid {grid}")


def lgvit_feature_losses(
    maps: Sequence[Tensor],
    grids: Sequence[Grid],
    kinds: Sequence[str | None],
    teacher: Tensor,
    teacher_grid: Grid,
) -> tuple[Tensor, Tensor]:
    """LGViT's heterogeneous and homogeneous distillation for any list of exits.

    Exits are grouped by the kind of their head. In each group, the first and the last learn from the backbone's last
    patches (heterogeneous), and all but the last from the last (homogeneous: maps for local heads, Gram matrices for
    global ones). Every teacher is aligned to its student. Exits without a feature map take no part.

    Args:
        maps (`Sequence[Tensor]`): Features of each early exit; `[B, N, D]` where `kinds` names a kind.
        grids (`Sequence[tuple]`): Patch grid that each exit read.
        kinds (`Sequence[str]`): `"local"`, `"global"` or `None`, of each exit.
        teacher (`Tensor`): `[B, M, D]`, the backbone's last patches, before its final norm.
        teacher_grid (`tuple`): Their grid.

    Returns:
        The two sums, each a scalar.
    """
    heterogeneous = homogeneous = teacher.new_zeros((), dtype=torch.float32)
    targets: dict[tuple[Grid, int], tuple[Tensor, Tensor]] = {}
    for kind, pair_loss in (("local", local_homogeneous_loss), ("global", global_homogeneous_loss)):
        members = [
            (features, map_grid(features.shape[1], grid))
            for features, grid, exit_kind in zip(maps, grids, kinds, strict=True)
            if exit_kind == kind
        ]
        if not members:
            continue
        for features, grid in members[:1] + members[1:][-1:]:
            shape = (grid, features.shape[-1])
            if shape not in targets:
                targets[shape] = _channel_target(align_map(teacher, teacher_grid, *shape))
            heterogeneous = heterogeneous + _channel_divergence(features, *targets[shape])
        last, last_grid = members[-1]
        for features, grid in members[:-1]:
            # Gram matrices have no tokens to align
            target_grid = grid if kind == "local" else last_grid
            aligned = align_map(last, last_grid, target_grid, features.shape[-1])
            homogeneous = homogeneous + pair_loss(features, aligned)
    return heterogeneous, homogeneous

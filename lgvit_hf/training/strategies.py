"""How exits share the loss at a step, for both stages (LGViT, https://arxiv.org/abs/2308.00255)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..configuration import HighwayConfig
from ..heads import head_kind
from ..losses import check_labels, distillation_loss, lgvit_feature_losses, loss_weights, task_loss, weighted_loss
from .arguments import HighwayTrainingArguments


def stage_one_loss(
    model: Callable,
    config: HighwayConfig,
    pixel_values: Tensor,
    labels: Tensor,
    args: HighwayTrainingArguments,
    step: int = 0,
    backbone_only: bool = False,
    teacher_logits: Tensor | None = None,
    **inputs,
) -> Tensor:
    """The loss of `HighwayTrainer` at optimizer step `step`.

    With cross-entropies `L_i` of exits after block `p_i` and `L` of the final classifier after the last, number `D`:
    `uniform` is their mean; `weighted` is `(sum p_i L_i + D L) / (sum p_i + D)`, or weighted by the list in the
    config's `exit_loss_weights` where there is one; the alternating ones are `L` at even steps and the former at odd
    ones; `distillation` is `(1 - c) * uniform + c * mean KD_i`; `backbone` is `L`;
    `single_exit` is one `L_i`; `mixed`, once exits have joined, is `(1 - c) * weighted + c * KD`, that of the final
    classifier against itself as it was before, summed over classes. What does not enter the loss is not computed.

    Args:
        model (callable): The highway, or what a launcher wrapped around it.
        config (`HighwayConfig`): The highway's config.
        pixel_values (`Tensor`), labels (`Tensor`): The batch.
        args (`HighwayTrainingArguments`): The strategy and its weights.
        step (`int`): From `trainer.state.global_step`, so that resuming, accumulation and several processes agree.
        backbone_only (`bool`): Whether this step trains the final classifier alone, whatever the strategy.
        teacher_logits (`Tensor`, *optional*): `[B, C]`, which hold up the final classifier of `mixed`.
        inputs: Further arguments of the highway's forward.
    """
    check_labels(labels, config.num_labels)
    strategy = args.strategy or "weighted"
    depth = only_depth(args, config)
    if backbone_only or (strategy.startswith("alternating") and step % 2 == 0):
        depth = config.num_blocks
    if depth is not None:
        answer = model(pixel_values, early_exit=True, min_depth=depth, max_depth=depth, **inputs)
        return task_loss(answer.logits, labels, config.problem_type)

    exit_logits = model(pixel_values, early_exit=False, **inputs).exit_logits
    shares: str | Sequence[float] = "uniform"
    if strategy == "mixed" or strategy.endswith("weighted"):
        shares = "depth" if isinstance(config.exit_loss_weights, str) else config.exit_loss_weights
    weights = loss_weights(shares, config.exit_positions, config.num_blocks)
    loss = weighted_loss(exit_logits, labels, weights, config.problem_type)
    if strategy == "distillation":
        kd = [distillation_loss(logits, exit_logits[-1], args.temperature) for logits in exit_logits[:-1]]
        loss = (1 - args.distillation_weight) * loss + args.distillation_weight * sum(kd) / len(kd)
    if teacher_logits is not None:
        # one of many terms: a mean over classes would be too weak to hold the final classifier
        kept = distillation_loss(exit_logits[-1], teacher_logits, args.temperature) * config.num_labels
        loss = (1 - args.distillation_weight) * loss + args.distillation_weight * kept
    return loss


def only_depth(args: HighwayTrainingArguments, config: HighwayConfig) -> int | None:
    """Where the one classifier stands that a strategy trains; `None` where it trains several."""
    if args.strategy == "backbone":
        return config.num_blocks
    return config.exit_positions[args.train_exit or 0] if args.strategy == "single_exit" else None


def stage_two_loss(
    model: Callable,
    config: HighwayConfig,
    pixel_values: Tensor,
    labels: Tensor,
    args: HighwayTrainingArguments,
    **inputs,
) -> Tensor:
    """The loss of `DistillationTrainer`: the exits learn from the labels and from the frozen final classifier.

    `distillation`, and `mixed` while its backbone is frozen: `(1 - c) * sum p_i L_i / sum p_i + c * mean KD_i`.
    `distillation_lgvit`:
    `(1 - c) * sum L_i + c * sum KD_i + heterogeneous_weight * L_hete + homogeneous_weight * L_homo`, the last two as
    `lgvit_feature_losses` gives them, for any number and kinds of exits. Arguments: see `stage_one_loss`.
    """
    check_labels(labels, config.num_labels)
    out = model(pixel_values, early_exit=False, **inputs)
    exit_logits, share = out.exit_logits[:-1], args.distillation_weight
    kd = sum(distillation_loss(logits, out.exit_logits[-1], args.temperature) for logits in exit_logits)
    if args.strategy in ("distillation", "mixed"):
        hard = weighted_loss(exit_logits, labels, config.exit_positions, config.problem_type)
        return (1 - share) * hard + share * kd / len(exit_logits)

    losses = sum(task_loss(logits, labels, config.problem_type) for logits in exit_logits)
    size = pixel_values.shape[-2:]
    *maps, last_map = out.exit_features
    *grids, last_grid = (config.patch_grid(depth, *size) for depth in (*config.exit_positions, config.num_blocks))
    kinds = [head_kind(head) for head in config.exit_types]
    heterogeneous, homogeneous = lgvit_feature_losses(maps, grids, kinds, last_map, last_grid)
    features = args.heterogeneous_weight * heterogeneous + args.homogeneous_weight * homogeneous
    return (1 - share) * losses + share * kd + features

"""The settings and the results of a training run, as lines of text."""

from __future__ import annotations

from typing import Any


def exit_accuracies_text(figures: dict[str, float]) -> str:
    """Figures of `ExitMetrics` on the test samples as lines of text."""
    exits = {int(name.split("_")[1]): value for name, value in figures.items() if name.startswith("exit_")}
    lines = ["on the test samples", "blocks run  accuracy"]
    lines += [f"{depth:10}  {accuracy:8.1%}" for depth, accuracy in sorted(exits.items())]
    if len(exits) > 1:
        lines.append(
            f"early exit by the policy: {figures['accuracy']:.1%} right, after {figures['mean_depth']:.2f} blocks "
            f"on average (layer speed-up {figures['layer_speed_up']:.2f}x)"
        )
    return "\n".join(lines)


def halting_text(figures: dict[str, float], model: Any) -> str:
    """Figures of `AViTMetrics` on the test samples as a line of text."""
    return (
        f"on the test samples: {figures['accuracy']:.1%} right, macro F1 {figures['macro_f1']:.3f}; tokens run "
        f"{figures['mean_token_depth']:.2f} of {model.config.num_hidden_layers} blocks on average, "
        f"{figures['macs'] / 1e6:.1f} MMACs an image"
    )


def exit_lines(model: Any) -> list[str]:
    """Exits with what they cost."""
    from ..evaluation.costs import model_macs
    from ..evaluation.profiling import head_names

    config, costs = model.config, model_macs(model)
    parameters = [sum(p.numel() for p in head.parameters()) for head in model.exits]
    total = sum(p.numel() for p in model.parameters())
    lines = [
        f"{type(model).__name__}: {config.num_blocks} blocks, {total / 1e6:.2f} M parameters, "
        f"{sum(parameters) / total:.1%} of them in {len(parameters)} exits; {config.num_labels} classes",
        "exit  position  head            parameters  MMACs of the head  MMACs until there",
    ]
    depths = [*config.exit_positions, config.num_blocks]
    for index, (depth, head, size) in enumerate(zip(depths, head_names(model), [*parameters, None], strict=True)):
        lines.append(
            f"{index:4}  {depth:8}  {head:14}  {'-' if size is None else size:>10}  {costs.heads[index] / 1e6:17.2f}  "
            f"{costs.of_exit(index) / 1e6:17.1f}"
        )
    backbone = total - sum(parameters)
    return [*lines, f"without exits: {backbone / 1e6:.2f} M parameters, {costs.backbone / 1e6:.1f} MMACs per image"]


def halting_lines(model: Any) -> list[str]:
    """What an image costs as long as no token halts."""
    import torch

    from ..token_halting import token_macs

    config = model.config
    num_tokens = model.backbone.embeddings.position_embeddings.shape[1]
    macs = token_macs(config, torch.full((1, num_tokens), config.num_hidden_layers)).item()
    total = sum(p.numel() for p in model.parameters())
    return [
        f"AViT: {config.num_hidden_layers} blocks, {total / 1e6:.2f} M parameters, none of them for halting; "
        f"{config.num_labels} classes",
        f"until tokens halt: {num_tokens} tokens, {macs / 1e6:.1f} MMACs per image",
    ]

"""A single file, which decides inside: which policies it can run by, and its answers as numpy arrays; no PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..policies import ExitPolicy, Numbers, build_policy, number_at
from ..serving.device.loop import ANSWERS
from .manifest import PARAMETERS, Manifest, exits_that_run
from .sessions import SESSIONS, Session


def parameter_inputs(policy: ExitPolicy, num_exits: int) -> dict[str, np.ndarray]:
    """What the adjustable inputs of a single file hold for a policy, all float32.

    Args:
        policy (`ExitPolicy`): A built-in one.
        num_exits (`int`): The final classifier counted.

    Example:

        >>> from lgvit_hf.policies import ConfidencePolicy
        >>> inputs = parameter_inputs(ConfidencePolicy(threshold=0.5), num_exits=3)
        >>> inputs["exit_thresholds"].tolist(), inputs["exit_temperatures"].tolist()
        ([0.5, 0.5], [1.0, 1.0, 1.0])
    """
    inputs = {"exit_temperatures": _spread(getattr(policy, "temperature", 1.0), num_exits, 1.0)}
    for name, called in PARAMETERS.items():
        if hasattr(policy, name):
            length = 1 if name == "patience" else max(1, num_exits - 1)
            inputs[called] = _spread(getattr(policy, name), length, 0.0)
    return inputs


def _spread(value: Numbers, length: int, default: float) -> np.ndarray:
    return np.array([number_at(value, index, default) for index in range(length)], dtype=np.float32)


def check_file_policy(
    policy: ExitPolicy, ensemble: dict[str, Any] | None, manifest: Manifest, runtime: str, folder: Path
) -> None:
    """Raise `ValueError` where a single file cannot decide by a policy, or answer by an ensemble, in a runtime."""
    if ensemble != manifest.ensemble:
        raise ValueError(
            f"exit_ensemble: this file answers with {manifest.ensemble}, not with {ensemble}; export it again, or "
            f"with the layout 'segments' ({folder})"
        )
    held, is_fixed = manifest.policy["name"], manifest.thresholds in SESSIONS[runtime].fixed
    ours = theirs = policy.to_dict()
    if is_fixed or policy.differs_by_exit:
        theirs = build_policy(manifest.policy, len(manifest.depths) - 1).to_dict()
    if is_fixed and ours != theirs:
        raise ValueError(
            f"exit_policy: {runtime} takes no new numbers for this file: its thresholds are {manifest.thresholds!r}; "
            f"export it with thresholds='input' (--thresholds) ({folder})"
        )
    if policy.name != held:
        raise ValueError(
            f"exit_policy: this file decides by {held!r}, not by {policy.name!r}; export it again, or with the layout "
            f"'segments' ({folder})"
        )
    if policy.differs_by_exit:
        for name, value in ours.items():
            if name not in ("threshold", "temperature") and value != theirs.get(name):
                raise ValueError(
                    f"exit_policy: {name} of {held!r} is in this file, which takes new thresholds and temperatures "
                    f"only; export it again ({folder})"
                )
    evaluated = exits_that_run(policy, len(manifest.depths))
    if manifest.ensemble is not None and evaluated != manifest.exits:
        raise ValueError(
            f"exit_policy: exits {evaluated} would be evaluated, and this file has the ensemble of exits "
            f"{manifest.exits}; export it again, or with the layout 'segments' ({folder})"
        )
    missing = sorted(set(evaluated) - set(manifest.exits))
    if missing:
        raise ValueError(
            f"exit_policy: exit {missing[0]} was skipped when this file was exported and is not in it; its exits: "
            f"{manifest.exits} ({folder})"
        )


def run_file(
    session: Session, pixels: np.ndarray, policy: ExitPolicy, num_exits: int, thresholds: np.ndarray | None = None
) -> list[np.ndarray]:
    """`ANSWERS` to a batch of `pixels` `[B, C, H, W]` float32, decided inside the file.

    Args:
        session (`Session`): Of the file.
        pixels (`np.ndarray`): From the image processor.
        policy (`ExitPolicy`): One that `check_file_policy` lets pass.
        num_exits (`int`): Of the whole highway, the final classifier counted.
        thresholds (`np.ndarray`, *optional*): `[B, E]` instead of the policy's, each sample's own.

    Raises:
        ValueError: `thresholds` are of another shape, or this file takes none for each sample.
    """
    # what this kind of policy has no use for is no input
    known = {entry.name for entry in (*session.get_inputs(), *session.get_overridable_initializers())}
    numbers = {name: array for name, array in parameter_inputs(policy, num_exits).items() if name in known}
    if thresholds is not None:
        if "exit_thresholds" not in {entry.name for entry in session.get_overridable_initializers()}:
            raise ValueError(
                f"exit_thresholds: this file takes none for each sample by {policy.name!r}; export a policy that has "
                "thresholds, with thresholds='optional' (--thresholds), and run it in ONNX Runtime"
            )
        wanted = (len(pixels), max(1, num_exits - 1))
        if thresholds.shape != wanted:
            raise ValueError(f"exit_thresholds: shape {thresholds.shape} must be {wanted}: samples, early exits")
        numbers["exit_thresholds"] = thresholds.astype(np.float32).reshape(-1)
    return session.run(ANSWERS, {"pixel_values": pixels, **numbers})

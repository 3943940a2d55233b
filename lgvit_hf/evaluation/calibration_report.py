"""What `calibrate` chose and promises: in words, as JSON, and read back."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..hub.report_keys import current_names
from .report_text import policy_in_words

# rungs of a ladder that are printed
SHOWN = 10
# what holds of a ladder whose rungs are all certified
MIXTURE = (
    "every rung holds the bound, and so does any mixture of them, if which rung a sample gets says nothing of the\n"
    "sample: samples must arrive independently of one another and be alike, and bursts of hard images void it"
)


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` chose, and what it is worth on samples it was not fitted on.

    Args:
        policy (`dict`): For `model.set_exit_policy`.
        exits (`tuple[int, ...]`): Indices of the early exits that stay; their heads are paid for.
        temperatures (`tuple[float, ...]`): One per exit, the final classifier last.
        accuracy (`float`): Share of the samples answered rightly; without labels, as the full model does.
        full_accuracy (`float`): The same of the full model.
        mean_depth (`float`): Blocks run per sample.
        mean_macs (`float`): Of one sample, heads counted.
        full_macs (`float`): Of the plain model.
        mean_latency (`float`, *optional*): Milliseconds per sample expected at the batch size asked for.
        full_latency (`float`, *optional*): The same of the plain model.
        bound (`str`): `"drop"`, `"harm"`, or `"none"`: no guarantee, but a point estimate on these samples.
        samples_tested (`int`): Samples tested on, which the search has not seen.
        delta (`float`, *optional*): Probability that the guarantee does not hold, over the calibration samples.
        guaranteed_drop (`float`, *optional*): What the true drop (or harm) then exceeds with that probability at most.
        max_accuracy_drop (`float`, *optional*): What was asked for; with `delta` the bound of each rung of the ladder.
        ladder (`tuple[dict, ...]`):
            Of the candidates within that drop (with `delta`, of those that are certified, all at once), those of the
            returned policy's family and exits, from the safest to the fastest: `policy`, `accuracy` (an estimate),
            `mean_macs`, `mean_latency` and its own `baseline`.
        frontier (`tuple[dict, ...]`): `policy`, `accuracy`, `mean_macs` and `mean_latency` of every candidate on the
            same samples, from the safest to the fastest.
        calibration_errors (`tuple[dict, ...]`): Of each exit, the expected calibration error of all samples `before`
            and `after` the temperature, and of those `exited` there, after it.
        ensemble (`dict`, *optional*): The `exit_ensemble` on which the policy decides.
        baseline (`dict`, *optional*): For `DriftMonitor`: `samples` tested on, how many exit at each of `exits` and
            are answered with each of `labels`, and `harm`: how many the full model answers otherwise, rightly or not.
        weights (`str`, *optional*): Digest of the model's weights, by which a ladder of another model is known.
    """

    policy: dict[str, Any]
    exits: tuple[int, ...]
    temperatures: tuple[float, ...]
    accuracy: float
    full_accuracy: float
    mean_depth: float
    mean_macs: float
    full_macs: float
    mean_latency: float | None
    full_latency: float | None
    bound: str
    samples_tested: int
    delta: float | None = None
    guaranteed_drop: float | None = None
    max_accuracy_drop: float | None = None
    ladder: tuple[dict[str, Any], ...] = ()
    frontier: tuple[dict[str, Any], ...] = ()
    calibration_errors: tuple[dict[str, float | None], ...] = ()
    ensemble: dict[str, Any] | None = None
    baseline: dict[str, Any] | None = None
    weights: str | None = None

    @property
    def n(self) -> int:
        """The old name of `samples_tested`."""
        warnings.warn("Calibration.n is now Calibration.samples_tested", DeprecationWarning, stacklevel=2)
        return self.samples_tested

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON takes it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def as_text(self) -> str:
        """What was chosen and promised, in a few lines."""
        what = {"drop": "accuracy drop", "harm": "share of samples where only the full model is right"}
        promise = f"no guarantee: point estimate on {self.samples_tested} samples"
        if self.delta is not None:
            promise = (
                f"the {what[self.bound]} is at most {self.guaranteed_drop:g} with probability {1 - self.delta:g} "
                f"(tested on {self.samples_tested} samples that were not searched on)"
            )
        times = ""
        if self.mean_latency is not None and self.full_latency is not None:
            times = (
                f"\nlatency      {self.mean_latency:.3f} ms per image, {self.full_latency:.3f} of the plain model: "
                f"{self.full_latency / self.mean_latency:.2f}x, as the cost table predicts"
            )
        return (
            f"policy       {policy_in_words(self.policy)}{', on the running ensemble' if self.ensemble else ''}\n"
            f"evaluated    exits {', '.join(map(str, self.exits)) or 'none: the full model answers'}\n"
            f"accuracy     {self.accuracy:.2%}, full model {self.full_accuracy:.2%}\n"
            f"mean depth   {self.mean_depth:.2f} blocks\n"
            f"MACs         {self.mean_macs / 1e6:.2f} M per image, heads counted, {self.full_macs / 1e6:.2f} M of the "
            f"plain model: {self.full_macs / self.mean_macs:.2f}x{times}\n{promise}{self._ladder_as_text()}"
        )

    def _ladder_as_text(self) -> str:
        """The candidates within the drop that differ from the policy in their thresholds only, safest first."""
        if len(self.ladder) < 2:
            return ""
        timed = self.mean_latency is not None
        lines = ["", "", f"rung   accuracy        MACs{'       ms' if timed else ''}   thresholds"]
        last = len(self.ladder) - 1
        for number in sorted({round(step * last / (SHOWN - 1)) for step in range(SHOWN)}):
            rung = self.ladder[number]
            latency = f"{rung['mean_latency']:9.3f}" if timed else ""
            threshold = policy_in_words({"name": "", "threshold": rung["policy"].get("threshold", "-")})
            lines.append(
                f"{number:4}   {rung['accuracy']:8.2%}   {rung['mean_macs'] / 1e6:7.2f} M{latency}   "
                f"{threshold.removeprefix(': threshold ')}"
            )
        if last >= SHOWN:
            lines.append(f"({last + 1} rungs in all)")
        if self.delta is not None:
            lines += ["", MIXTURE]
        return "\n".join(lines)

    @classmethod
    def load(cls, file: str | Path) -> Calibration:
        """Read the report that `lgvit calibrate` wrote, `calibration.json`; those of version 0.1, too.

        Raises:
            ValueError: The file is no such report.
        """
        try:
            content: dict[str, Any] = current_names(json.loads(Path(file).read_text(encoding="utf-8")))
            lists = {name: tuple(value) for name, value in content.items() if isinstance(value, list)}
            known = {field.name for field in fields(cls)}
            return cls(**{name: value for name, value in (content | lists).items() if name in known})
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is not what `lgvit calibrate` writes ({error})") from error

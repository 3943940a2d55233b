"""Do samples still come from where the calibration samples came from? Bets on exits, labels and audited harm.

The calibration samples tell the rates of today only up to an error, so each test here is of two samples: those of the
calibration, of a fixed number, and those in use, of which there are more and more. See `log_evidence` for the theory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import betaln, logsumexp, xlogy

# of the calibration samples' log-likelihood ratio, the power that counts, in (0, 1)
_POWER = 0.75
# bets are sized for rates that differ from the calibrated ones as much as those of so many samples would
_SPREAD = 25.0
# samples after which new counts begin beside those of all samples: a change is sought in what came lately, too
WINDOW = 5000
CHANNELS = ("exits", "labels", "harm")
HOW = "`lgvit calibrate CHECKPOINT --data DATA --max-accuracy-drop SHARE` writes a new one"


def log_evidence(
    counts: np.ndarray, samples: np.ndarray | int, baseline_counts: np.ndarray, baseline_samples: int
) -> np.ndarray:
    r"""Log of an e-process against "events are as frequent as in the baseline", whatever that frequency is.

    For a frequency `p`, bets at the odds of `p` on the samples in use (a Beta mixture around the baseline's rate) are
    a martingale, and `(1 - r) exp(r n KL(rate || p))` of the baseline's `n` samples has an expectation of at most 1
    (Agrawal, https://arxiv.org/abs/1809.02300). Their product is a martingale for the true `p`, so its infimum over
    all `p`, which is where both samples together put it, is at most that: it ever exceeds `1 / alpha` with probability
    at most `alpha`, over the draw of the baseline and of all samples (universal inference,
    https://arxiv.org/abs/1912.11436).

    Args:
        counts (`np.ndarray`): `[...]`, samples with the event.
        samples (`np.ndarray` or `int`): All samples so far.
        baseline_counts (`np.ndarray`), baseline_samples (`int`): The same of the baseline.

    Returns:
        `[...]` float64; e-processes may be averaged, whatever they have in common.

    Example:

        >>> as_before, more = log_evidence(np.array([500, 600]), 1000, np.array([2500, 2500]), 5000)
        >>> bool(as_before < 0), bool(more > np.log(1000))
        (True, True)
    """
    n, c, t, s = baseline_samples, baseline_counts, samples, counts
    common = (_POWER * c + s) / (_POWER * n + t)
    centre = (c + 0.5) / (n + 1)
    a, b = _SPREAD * centre, _SPREAD * (1 - centre)
    bets = betaln(a + s, b + t - s) - betaln(a, b) - _log_likelihood(s, t, common)
    error = _POWER * (_log_likelihood(c, n, c / n) - _log_likelihood(c, n, common)) + math.log(1 - _POWER)
    evidence: np.ndarray = bets + error
    return evidence


def _log_likelihood(counts: np.ndarray, samples: np.ndarray | int, rate: np.ndarray) -> np.ndarray:
    likelihood: np.ndarray = xlogy(counts, rate) + xlogy(samples - counts, 1 - rate)
    return likelihood


def load_baseline(file: str | Path) -> dict[str, Any]:
    """The baseline in what `lgvit calibrate` wrote, `calibration.json`.

    Raises:
        ValueError: The file is no such report, or of a version that kept no baseline.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not what `lgvit calibrate` writes ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("baseline"), dict):
        raise ValueError(f"{file} has no baseline to compare with; {HOW}")
    return check_baseline(content["baseline"])


def check_baseline(baseline: Mapping[str, Any]) -> dict[str, Any]:
    """A baseline whose counts fit together.

    Raises:
        ValueError: A count is missing, or more or less than the samples.
    """
    for name in ("samples", "exits", "labels", "harm"):
        if baseline.get(name) is None:
            raise ValueError(f"the baseline has no {name!r}; {HOW}")
    samples, harm = baseline["samples"], baseline["harm"]
    counts = {name: baseline[name] for name in ("exits", "labels")}
    if type(samples) is not int or samples < 1:
        raise ValueError(f"baseline: samples={samples!r} must be a number of samples; {HOW}")
    for name, values in counts.items():
        if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
            raise ValueError(f"baseline: {name} must be a list of counts; {HOW}")
        if sum(values) != samples:
            raise ValueError(f"baseline: {name} are of {sum(values)} samples, not of {samples}; {HOW}")
    if type(harm) is not int or not 0 <= harm <= samples:
        raise ValueError(f"baseline: harm={harm!r} must be a number of samples from 0 to {samples}; {HOW}")
    return {"samples": samples, **counts, "harm": harm}


class _Counts:
    """What was seen of some samples, by channel; harm of those that were audited."""

    def __init__(self, num_exits: int, num_labels: int):
        self.samples = {channel: 0 for channel in CHANNELS}
        self.events = {
            name: np.zeros(size, np.int64) for name, size in zip(CHANNELS, (num_exits, num_labels, 1), strict=True)
        }

    def add(self, channel: str, events: np.ndarray) -> None:
        """Count which event each sample was; what is none is a sample only."""
        counts = self.events[channel]
        counts += np.bincount(events, minlength=len(counts) + 1)[: len(counts)]
        self.samples[channel] += len(events)

    def evidence(self, baseline: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The log of the e-process of each event, by channel; their mean over events, then channels, is one, too."""
        found = {}
        for channel in CHANNELS:
            known, seen = np.atleast_1d(baseline[channel]), self.samples[channel]
            found[channel] = log_evidence(self.events[channel], seen, known, baseline["samples"])
        # less harm than before is no reason for an alarm
        rarer = self.events["harm"] * baseline["samples"] < baseline["harm"] * self.samples["harm"]
        found["harm"] = np.where(rarer, -np.inf, found["harm"])
        return found

    def to_dict(self) -> dict[str, Any]:
        events = {channel: self.events[channel].tolist() for channel in CHANNELS[:2]}
        return {"samples": self.samples["exits"], **events, "audited": self.samples["harm"], "harm": self._harm}

    @property
    def _harm(self) -> int:
        return int(self.events["harm"][0])

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> _Counts:
        counts = cls(len(content["exits"]), len(content["labels"]))
        for channel, events in counts.events.items():
            events += np.atleast_1d(content[channel])
            counts.samples[channel] = int(content["audited" if channel == "harm" else "samples"])
        return counts


class DriftMonitor:
    """Raises an alarm where exits, labels or audited harm are no longer as frequent as when the policy was calibrated.

    While nothing changes and samples are independent of one another, an alarm is ever raised with probability at most
    `alpha`, over the draw of the calibration samples too, however long it runs and however often it is looked at.
    Half of `alpha` is for the counts of all samples. As a change that comes late would drown in these, counts begin
    anew after every 5,000 samples, the m-th time with a share of `1 / m (m + 1)` of the other half.

    Args:
        baseline (`dict`):
            `report.baseline` of `calibrate`, or of a rung of `report.ladder`; `load_baseline(file)` reads the first.
        alpha (`float`, *optional*, defaults to 0.001): Probability of a false alarm, in (0, 1).
        state (`dict`, *optional*): What `state()` gave, to go on from there.

    Raises:
        ValueError: `alpha` is out of range, a count is missing, or the state is of another baseline or damaged.

    Example:

        >>> baseline = {"samples": 1000, "exits": [500, 500], "labels": [500, 500], "harm": 10}
        >>> monitor = DriftMonitor(baseline)
        >>> monitor.update([0, 1] * 500, [1, 0] * 500)
        >>> monitor.alarm
        False
        >>> monitor.update(exit_index=[1] * 500, label=[1, 0] * 250, harm=[False, False])
        >>> monitor.alarm, DriftMonitor(baseline, state=monitor.state()).alarm
        (True, True)
    """

    def __init__(self, baseline: Mapping[str, Any], *, alpha: float = 0.001, state: Mapping[str, Any] | None = None):
        if not 0 < alpha < 1:
            raise ValueError(f"alpha={alpha!r}, the probability of a false alarm, must be between 0 and 1")
        self.baseline, self.alpha = check_baseline(baseline), alpha
        self._sizes = len(self.baseline["exits"]), len(self.baseline["labels"])
        self._all, self._recent, self._windows = _Counts(*self._sizes), _Counts(*self._sizes), 1
        self.p_value, self.alarm_at = 1.0, None if state is None else state.get("alarm_at")
        if state is not None:
            self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        if state.get("baseline") != self.baseline:
            raise ValueError("the state is of another baseline; leave it out to begin anew")
        try:
            self._all, self._recent = (_Counts.from_dict(state[name]) for name in ("all", "recent"))
            self._windows, self.p_value = int(state["windows"]), float(state["p_value"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the state is damaged ({error}); leave it out to begin anew") from error

    @property
    def alarm(self) -> bool:
        """Whether the evidence was ever enough."""
        return self.p_value <= self.alpha

    @property
    def samples(self) -> int:
        """Samples seen so far."""
        return self._all.samples["exits"]

    def update(
        self,
        exit_index: int | Sequence[int] | np.ndarray,
        label: int | Sequence[int] | np.ndarray,
        harm: bool | Sequence[bool] | np.ndarray | None = None,
    ) -> None:
        """Count a sample, or a batch of them.

        Args:
            exit_index (`int` or `[B]`): Where each exited, from 0, the final classifier last.
            label (`int` or `[B]`): What each was answered with, by number.
            harm (`bool` or `[A]` bool, *optional*):
                Of those of them that were audited, whether the full model answers otherwise.

        Raises:
            ValueError: An exit or a label that the baseline does not have; nothing is counted then.
        """
        exits, labels = _numbers("exit_index", exit_index, self._sizes[0]), _numbers("label", label, self._sizes[1])
        if len(exits) != len(labels):
            raise ValueError(f"{len(exits)} exit_index but {len(labels)} label: give one of each per sample")
        harms = _numbers("harm", () if harm is None else harm, 2)
        if self._recent.samples["exits"] >= WINDOW:
            self._recent, self._windows = _Counts(*self._sizes), self._windows + 1
        for counts in (self._all, self._recent):
            for channel, events in zip(CHANNELS, (exits, labels, 1 - harms), strict=True):
                counts.add(channel, events)
        total = np.logaddexp(*(_mean(self._weighed(counts)) for counts in (self._all, self._recent)))
        self.p_value = min(self.p_value, math.exp(-max(float(total), 0.0)))
        if self.alarm and self.alarm_at is None:
            self.alarm_at = self.samples

    def _weighed(self, counts: _Counts) -> dict[str, np.ndarray]:
        share = math.log(2) if counts is self._all else math.log(2 * self._windows * (self._windows + 1))
        return {channel: found - share for channel, found in counts.evidence(self.baseline).items()}

    def state(self) -> dict[str, Any]:
        """All that is known, as plain JSON; for `DriftMonitor(baseline, state=...)`."""
        counts = {"all": self._all.to_dict(), "recent": self._recent.to_dict()}
        found = {"p_value": self.p_value, "alarm_at": self.alarm_at}
        return {"baseline": self.baseline, **counts, "windows": self._windows, **found}

    def report(self) -> dict[str, Any]:
        """What changed, as plain JSON: of each event its share in the baseline and since, and a p-value.

        The counts are those of all samples or the recent ones, whichever say more; `since` is where they begin. A
        p-value of `alpha` or less raises the alarm by itself.
        """
        counts = max((self._all, self._recent), key=lambda each: float(_mean(self._weighed(each))))
        found = self._weighed(counts)

        def rows(channel: str, name: str) -> list[dict[str, Any]]:
            known, seen = np.atleast_1d(self.baseline[channel]), counts.samples[channel]
            bar = math.log(len(CHANNELS) * len(known))
            return [
                {
                    name: index,
                    "baseline_share": int(before) / self.baseline["samples"],
                    "share": int(now) / seen if seen else None,
                    "p_value": math.exp(-max(float(evidence) - bar, 0.0)),
                }
                for index, (before, now, evidence) in enumerate(
                    zip(known, counts.events[channel], found[channel], strict=True)
                )
            ]

        [harm] = rows("harm", "audited")
        return {
            "samples": self.samples,
            "alpha": self.alpha,
            "alarm": self.alarm,
            "alarm_at": self.alarm_at,
            "p_value": self.p_value,
            "since": self.samples - counts.samples["exits"],
            "exits": rows("exits", "exit_index"),
            "labels": rows("labels", "label"),
            "harm": {**harm, "audited": counts.samples["harm"]},
        }


def _mean(evidence: Mapping[str, np.ndarray]) -> np.ndarray:
    """Log of the mean over channels of the mean over events."""
    means = [logsumexp(found) - math.log(len(found)) for found in evidence.values()]
    mean: np.ndarray = logsumexp(means) - math.log(len(means))
    return mean


def _numbers(name: str, values: Any, below: int) -> np.ndarray:
    numbers = np.atleast_1d(np.asarray(values))
    if numbers.ndim != 1 or (len(numbers) and numbers.dtype.kind not in "iub"):
        raise ValueError(f"{name}={values!r} must be a whole number, or a list of them")
    wrong = numbers[(numbers < 0) | (numbers >= below)] if len(numbers) else numbers
    if len(wrong):
        raise ValueError(f"{name}={wrong[0]} is none of the {below} that the baseline has, from 0")
    return numbers.astype(np.int64)

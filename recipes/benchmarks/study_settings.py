"""How the study chooses a method's settings: all that it offers on a table of exits, and the cheapest right enough."""

from itertools import product
from typing import Any

import torch

from lgvit_hf import CostTable, ExitTable
from lgvit_hf.evaluation.calibration import fit_temperature
from lgvit_hf.evaluation.predictions import replayed_exits, shares
from lgvit_hf.evaluation.search import SEARCHES
from lgvit_hf.evaluation.threshold_search import RANGES, confidence_scores, uniform_thresholds

Settings = dict[str, Any]
Offer = tuple[float, float, Settings]  # how often it is right, what it costs


def replayed(table: ExitTable, settings: Settings) -> dict[str, Any]:
    """Which rows of a table are right under a policy, where they leave, and what they cost."""
    left, evaluated = replayed_exits(table, settings)
    exiting_at = shares(left, len(table.depths))
    return {
        "right": table.right.gather(0, left[None])[0],
        "depth": torch.tensor(table.depths)[left].double().mean().item(),
        "macs_speed_up": table.costs.backbone / table.costs.mean(exiting_at, evaluated),
        "exit_shares": exiting_at,
        "evaluated": evaluated,
    }


def published(table: ExitTable, policy: str) -> list[Offer]:
    """Settings that are the same at all exits, by MACs."""
    offers = []
    for settings in (*singles(table, policy), {"name": "never"}):
        facts = replayed(table, settings)
        offers.append((share(facts["right"]), 1 / facts["macs_speed_up"], settings))
    return offers


def singles(table: ExitTable, policy: str) -> list[Settings]:
    """What a policy with the same setting at all exits may be set to."""
    exits = len(table.depths) - 1
    if policy == "patience":
        return [{"name": policy, "patience": patience} for patience in range(1, exits + 2)]
    of = "entropy" if policy == "patience_confidence" else policy
    scores = confidence_scores(table, of, (1.0,) * (exits + 1)).numpy()
    sign = -1 if of == "entropy" else 1
    cuts = [sign * cut[0].item() for cut in uniform_thresholds(scores, RANGES[of], 100)]
    if policy == "patience_confidence":
        return [{"name": policy, "threshold": c, "patience": p} for c, p in product(cuts, (1, 2, 3)) if p <= exits]
    return [{"name": policy, "threshold": cut} for cut in cuts]


def calibrated(table: ExitTable, costs: CostTable, size: int) -> list[Offer]:
    """Temperatures, thresholds and exits, as `lgvit calibrate` searches for them, by the clock at a batch size."""
    temperatures = tuple(fit_temperature(logits, table.labels) for logits in table.logits)
    searched = SEARCHES["confidence"](table, costs.at(size), "confidence", temperatures, True)
    offers = []
    for settings in ({"name": "never"}, *(entry.settings for entry in searched)):
        facts = replayed(table, settings)
        price = costs.mean_latency(facts["exit_shares"], facts["evaluated"], size)
        offers.append((share(facts["right"]), price, settings))
    return offers


def cheapest(offers: list[Offer], least: float) -> Settings | None:
    """The settings that cost least and are right at least as often; `None` where none are."""
    within = [(price, settings) for accuracy, price, settings in offers if accuracy >= least]
    return min(within, key=lambda offer: offer[0], default=(0.0, None))[1]


def share(right: torch.Tensor) -> float:
    """Of rows that are right."""
    return right.double().mean().item()


def against(right: torch.Tensor, plain: torch.Tensor) -> dict[str, float]:
    """Accuracy, its drop against the plain backbone, and half the width of the drop's 95 % interval (paired)."""
    lost = plain.double() - right.double()
    return {
        "accuracy": share(right),
        "drop": lost.mean().item(),
        "drop_plus_minus": 1.96 * lost.std().item() / len(lost) ** 0.5,
    }

"""Figures, as PNG files, from plain numbers. The only package that imports matplotlib.

A file per subject; `style.py` is what all share.
"""

from .classes import plot_classes
from .confusion import plot_confusion
from .costs import plot_pareto
from .drift import plot_drift
from .exits import plot_exits, plot_report
from .images import plot_gallery, plot_scores
from .latency import plot_latency
from .reliability import plot_reliability
from .tokens import plot_token_depths, plot_tokens_alive
from .training import plot_training

__all__ = [
    "plot_classes",
    "plot_confusion",
    "plot_drift",
    "plot_exits",
    "plot_gallery",
    "plot_latency",
    "plot_pareto",
    "plot_reliability",
    "plot_report",
    "plot_scores",
    "plot_token_depths",
    "plot_tokens_alive",
    "plot_training",
]

"""A Trainer that looks at every model it trains: the one it is given, and those that `model_init` makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel, TrainingArguments, set_seed

from .trainer_card import CardTrainer


class FreshModelTrainer(CardTrainer):
    """A `Trainer` whose `_take` sees every model before it is trained; `_measure` says what its evaluation counts."""

    def _first_model(
        self, model: PreTrainedModel | None, args: TrainingArguments, arguments: dict[str, Any]
    ) -> tuple[PreTrainedModel, Callable | None]:
        """The model to begin with, and the `model_init` that made it, which is taken out of the arguments.

        Upstream makes that model itself, but later than datasets and metrics need it.
        """
        self.args = args
        if model is not None:
            self._take(model)
            return model, None
        model_init = self.model_init = arguments.pop("model_init", None)
        if model_init is None:
            raise ValueError("model: none was given; give one, or a model_init that makes one")
        if any(each is not None for each in arguments.get("optimizers") or ()):
            raise ValueError("optimizers: they hold another model's weights than model_init will make; leave them out")
        set_seed(args.seed)
        return self.call_model_init(), model_init

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        """As upstream's; what `model_init` makes is checked and frozen as a model that is given."""
        model = super().call_model_init(trial)
        self._take(model)
        if hasattr(self, "compute_metrics"):
            self._measure(model)
        return model

    def _take(self, model: PreTrainedModel) -> None:
        """Check a model, and freeze what is not trained."""

    def _measure(self, model: PreTrainedModel) -> None:
        """Set `compute_metrics` for a model, where the user has set none."""

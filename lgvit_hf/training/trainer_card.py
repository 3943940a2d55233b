"""The card that a `Trainer` writes: what its model is, and what its own evaluations found."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from ..hub.card import TRAINING, card, has_card, is_own, reports_beside, write_card

# of an evaluation's log, not worth a line
OMITTED = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")


class CardTrainer(Trainer):
    """A `Trainer` whose `create_model_card`, and with it `push_to_hub`, writes the card of `lgvit card`.

    Beside a model that is saved in `args.output_dir` there are no training arguments, which are a pickle.
    """

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if output_dir is None or Path(output_dir) == self._folder:
            (self._folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `README.md` into `args.output_dir`, with the figures of the last evaluation; one's own README stays.

        Args:
            args, kwargs: See `transformers.Trainer.create_model_card`. Such a card uses `license`, `tags`,
                `model_name` (else `args.hub_model_id` or the folder's name), `finetuned_from` and `dataset_tags`.
        """
        model, readme = self.accelerator.unwrap_model(self.model), self._folder / "README.md"
        if not has_card(model.config):
            return super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero() or is_own(readme):
            return
        given = inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments
        name = getattr(self, "hub_model_id", None) or given.get("model_name") or self._folder.resolve().name
        wanted = map(given.get, ("dataset_tags", "tags"))
        datasets, tags = ([value] if isinstance(value, str) else value or [] for value in wanted)
        reports: list[Any] = [*map(str, reports_beside(self._folder)), *self._last_evaluation()]
        about: dict[str, Any] = {"base_model": given.get("finetuned_from"), "license": given.get("license")}
        write_card(card(model, reports, name=name, datasets=datasets, tags=tags, **about), readme)

    def _last_evaluation(self) -> list[dict[str, Any]]:
        """The figures of the newest log of an evaluation, without its duration."""
        logs = [log for log in self.state.log_history if "eval_loss" in log]
        if not logs:
            return []
        names = [name for name in logs[-1] if name.startswith("eval_") and name not in OMITTED]
        figures = {name.removeprefix("eval_"): logs[-1][name] for name in names}
        return [{"what": TRAINING, "step": logs[-1]["step"], "figures": figures}]

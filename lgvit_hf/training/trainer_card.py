"""The card that a `Trainer` writes: what its model is, and what its own evaluations found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from ..hub.card import TRAINING, card, has_card, is_own, reports_beside, write_card

# of an evaluation's log, not worth a line
UNTOLD = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


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

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` into `args.output_dir`, with the figures of the last evaluation; one's own README stays.

        Args:
            license (`str`, *optional*), tags (`str` or `list[str]`, *optional*): As on the Hub.
            model_name (`str`, *optional*): Of the repository, by default `args.hub_model_id` or the folder's name.
            finetuned_from (`str`, *optional*): Hub id of the base model.
            dataset_tags (`str` or `list[str]`, *optional*): Hub ids of the data sets.
            language, tasks, dataset, dataset_args: See `transformers.Trainer`; such a card has no use for them.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not has_card(model.config):
            given = (language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args)
            return super().create_model_card(*given)
        readme = self._folder / "README.md"
        if not self.is_world_process_zero() or is_own(readme):
            return
        name = getattr(self, "hub_model_id", None) or model_name or self._folder.resolve().name
        datasets, wanted = ([value] if isinstance(value, str) else value or [] for value in (dataset_tags, tags))
        reports: list[Any] = [*map(str, reports_beside(self._folder)), *self._last_evaluation()]
        made = card(
            model, reports, name=name, datasets=datasets, base_model=finetuned_from, license=license, tags=wanted
        )
        write_card(made, readme)

    def _last_evaluation(self) -> list[dict[str, Any]]:
        """The figures of the newest log of an evaluation, without what only says how long it took."""
        logs = [log for log in self.state.log_history if "eval_loss" in log]
        if not logs:
            return []
        figures = {name.removeprefix("eval_"): value for name, value in logs[-1].items() if name.startswith("eval_")}
        figures = {name: value for name, value in figures.items() if name not in UNTOLD}
        return [{"what": TRAINING, "step": logs[-1]["step"], "figures": figures}]

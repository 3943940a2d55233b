"""The model card: what the config and the reports of `lgvit evaluate`, `calibrate` and `benchmark` say; no more."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PretrainedConfig, PreTrainedModel

from ..configuration import HighwayConfig
from ..files import replace_file
from ..policies import build_policy
from ..segments import height_width
from .loading import HIGHWAYS, answer_depths, read_config
from .report_keys import current_names

TEMPLATE = Path(__file__).with_name("model_card_template.md")
# a README that has this line is ours to write again
MARK = "<!-- Made by `lgvit card` from the config and the reports of this model. -->"
# reports that lie in a checkpoint's folder, by what says so in them
REPORTS = {
    "lgvit evaluate": "evaluation.json",
    "lgvit calibrate": "calibration.json",
    "lgvit benchmark": "benchmark.json",
}
TRAINING = "evaluation in training"
# what may lie beside a card for a browser, and what it shows
PAGES = {
    "report.html": "What thresholds do to accuracy, cost, exits and classes",
    "index.html": "The model in a browser",
}
TASK = "image-classification"
# as `lgvit benchmark` has it
NOISY = 0.25


def card(
    model: str | Path | PreTrainedModel | PretrainedConfig,
    reports: Sequence[str | Path | Mapping[str, Any]] = (),
    *,
    name: str | None = None,
    datasets: Sequence[str] = (),
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    figure: str | None = None,
    pages: Sequence[str] = (),
) -> ModelCard:
    """The card of a highway or an `AViT`. What no report says is left out.

    Args:
        model (`str`, `Path`, `PreTrainedModel` or `PretrainedConfig`): Folder or Hub id, or what was loaded from it.
        reports (`Sequence`, *optional*):
            JSON files of `lgvit evaluate`, `lgvit calibrate` and `lgvit benchmark`, or what is in them.
        name (`str`, *optional*): What the snippet loads: the Hub id; by default the name of the folder.
        datasets (`Sequence[str]`, *optional*): Hub ids.
        base_model (`str`, *optional*), license (`str`, *optional*), tags (`Sequence[str]`, *optional*): As on the Hub.
        figure (`str`, *optional*): Name of the picture of accuracy against cost beside the card.
        pages (`Sequence[str]`, *optional*): Those of `PAGES` that lie beside the card.

    Raises:
        ValueError: A report is of none of these commands, of other exits, or of another policy than the config's.
        OSError: There is no saved model, or no such report.

    Example:

        >>> from lgvit_hf import ViTHighwayConfig
        >>> made = card(ViTHighwayConfig(num_hidden_layers=4, exit_positions=[2], exit_types="linear"), name="me/vit")
        >>> made.data.tags[:2], made.data.pipeline_tag
        (['early-exit', 'vit_highway'], 'image-classification')
        >>> [line for line in made.text.splitlines() if line.startswith("| 0")]
        ['| 0 | 2 | linear |']
    """
    if isinstance(model, PretrainedConfig):
        config = model
    else:
        config = model.config if isinstance(model, PreTrainedModel) else read_config(str(model))
    if not has_card(config):
        raise ValueError(f"model type {config.model_type!r}: cards are of {', '.join(HIGHWAYS)} and avit")
    if name is None:
        name = Path(model).resolve().name if isinstance(model, (str, Path)) else config.model_type
    kinds: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in (*REPORTS, TRAINING)}
    for report in reports:
        content = read_report(report)
        _check(content, config, "a report" if isinstance(report, Mapping) else str(report))
        kinds[content["what"]].append(content)
    judged = [*kinds["lgvit evaluate"], *kinds[TRAINING]]
    results = [result for report in judged for result in _results(report, datasets)]
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=list(dict.fromkeys(["early-exit", config.model_type, "vision", "lgvit-hf", *tags])),
        datasets=list(datasets) or None,
        base_model=base_model,
        metrics=["accuracy"] if results else None,
        model_name=name.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        mark=MARK,
        name=name,
        figure=figure,
        pages={name: PAGES[name] for name in pages},
        config=config,
        family=_family(config),
        image_size=height_width(config.image_size),
        evaluations=kinds["lgvit evaluate"],
        calibrations=kinds["lgvit calibrate"],
        benchmarks=kinds["lgvit benchmark"],
        trainings=kinds[TRAINING],
        data_name=data_name,
        as_json=lambda policy: json.dumps(_rounded(policy)),
        noisy=NOISY,
    )


def read_report(report: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """What is in a report, by which command it was written included, as `what`.

    Raises:
        ValueError: It is no report of one of the commands.
        OSError: There is no such file.
    """
    content, known = report, (*REPORTS, TRAINING)
    if not isinstance(report, Mapping):
        try:
            content = json.loads(Path(report).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{report}: no JSON ({error})") from error
    what = content.get("what") if isinstance(content, Mapping) else type(content).__name__
    if not isinstance(content, Mapping) or what not in known:
        raise ValueError(f"{'report' if content is report else report}: what={what!r} must be one of {known}")
    return current_names(dict(content))


def reports_beside(folder: str | Path) -> list[Path]:
    """The reports that lie in a checkpoint's folder under the names of `REPORTS`, whichever are there."""
    return [file for name in REPORTS.values() if (file := Path(folder) / name).is_file()]


def pages_beside(folder: str | Path) -> list[str]:
    """The pages that lie in a folder under the names of `PAGES`, as `lgvit report` and `export --web` write them."""
    return [name for name in PAGES if (Path(folder) / name).is_file()]


def _family(config: PretrainedConfig) -> str:
    """The backbone, as people call it."""
    kind = f"{config.backbone}_highway" if config.model_type == "avit" else config.model_type
    return HIGHWAYS[kind].__name__.removesuffix("Highway")


def has_card(config: PretrainedConfig) -> bool:
    """Whether `card` knows what to say of such a model."""
    return config.model_type in (*HIGHWAYS, "avit")


def is_own(readme: str | Path) -> bool:
    """Whether somebody wrote this README, and it must stay."""
    file = Path(readme)
    return file.is_file() and MARK not in file.read_text(encoding="utf-8", errors="replace")


def write_card(card: ModelCard, readme: str | Path) -> None:
    """Write a card, all of it or nothing, and the scores for the Hub's leaderboards beside it.

    The scores (`.eval_results/`) need a version of `huggingface_hub` that knows them, and a data set on the Hub.

    Raises:
        ValueError: There is a README that was not made here.
    """
    readme = Path(readme)
    if is_own(readme):
        raise ValueError(f"{readme} was not made by `lgvit card` and stays; choose another output, or move it away")
    with replace_file(readme) as file:
        file.write_text(str(card).rstrip() + "\n", encoding="utf-8")
    scores = leaderboard_scores(card)
    if scores is not None:
        with replace_file(readme.parent / ".eval_results" / f"{TASK}.yaml") as file:
            file.write_text(scores, encoding="utf-8")


def leaderboard_scores(card: ModelCard) -> str | None:
    """Accuracies of a card as YAML for `.eval_results/`; `None` where the Hub library or the Hub lacks the like."""
    try:
        from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    except ImportError:
        return None
    import yaml

    entries = [
        EvalResultEntry(result.dataset_type, TASK, result.metric_value, notes=result.metric_name)
        for result in card.data.get("eval_results") or []
        if "/" in result.dataset_type and result.metric_type == "accuracy"
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else None


def data_name(report: Mapping[str, Any]) -> str:
    """What the data of a report are called: a Hub id, or the last name of a path."""
    data = str(report["data"])
    return Path(data).name if data.startswith((".", "/", "~")) or Path(data).exists() else data


def _check(report: Mapping[str, Any], config: PretrainedConfig, where: str) -> None:
    """Raise `ValueError` where a report is not of this model as it now answers."""
    if report["what"] == TRAINING:
        return
    if not isinstance(config, HighwayConfig):
        raise ValueError(f"{where}: {report['what']} is of a highway, and the model is an {config.model_type}")
    if report["what"] != "lgvit calibrate":
        depths, ours = [exit["exit_layer"] for exit in report["exits"]], answer_depths(config)
        if depths != ours:
            raise ValueError(f"{where} is of a model that answers at depths {depths}, this one at {ours}")
    made = report["environment"] if report["what"] == "lgvit benchmark" else report
    policy, ensemble = made["policy"], made.get("ensemble")
    if ensemble != config.exit_ensemble:
        raise ValueError(
            f"{where} was made with the ensemble {ensemble}, and the config says {config.exit_ensemble}; make it again"
        )
    now = build_policy(config.exit_policy, len(config.exits)).to_dict()
    if build_policy(dict(policy), len(config.exits)).to_dict() != now:
        raise ValueError(f"{where} was made under the policy {policy}, and the config says {now}; make it again")


def _results(report: Mapping[str, Any], datasets: Sequence[str]) -> list[EvalResult]:
    figures: list[tuple[str, float | None, str, dict[str, Any] | None]]
    if report["what"] == TRAINING:
        kind: Any = report.get("data") or (datasets[0] if datasets else None)
        name = kind
        figures = [("accuracy", report["figures"].get("accuracy"), "Accuracy", None)]
    else:
        overall, name = report["overall"], data_name(report)
        kind = datasets[0] if len(datasets) == 1 else name
        about = {"exit_policy": _rounded(report["policy"])}
        figures = [
            ("accuracy", overall["accuracy"], "Accuracy, early exit", about),
            ("accuracy", overall["accuracy_full_model"], "Accuracy, full model", None),
            ("mean_depth", overall["mean_depth"], "Mean depth in blocks", about),
            ("macs", overall["mean_macs"], "Mean MACs of an image", about),
        ]
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=kind,
            dataset_name=name,
            dataset_split=report.get("split"),
            metric_type=metric,
            metric_value=round(value, 6),
            metric_name=title,
            metric_args=arguments,
        )
        for metric, value, title, arguments in figures
        if value is not None and name is not None
    ]


def _rounded(policy: Mapping[str, Any]) -> Any:
    """Numbers to four digits, for a reader."""
    return json.loads(json.dumps(policy), parse_float=lambda number: float(f"{float(number):.4g}"))

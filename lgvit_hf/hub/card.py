"""The model card: what the config and the reports of `lgvit evaluate`, `calibrate` and `benchmark` say; no more."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PretrainedConfig, PreTrainedModel

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
TASK = "image-classification"
# as `lgvit benchmark` has it
NOISY = 0.25
FAMILIES = {"vit": "ViT", "deit": "DeiT", "swin": "Swin"}


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
    config = _config_of(model)
    if name is None:
        name = Path(model).resolve().name if isinstance(model, (str, Path)) else config.model_type
    kinds: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in (*REPORTS, TRAINING)}
    for report in reports:
        content = read_report(report)
        _check(content, config, "a report" if isinstance(report, Mapping) else str(report))
        kinds[content["what"]].append(content)
    evaluations = kinds["lgvit evaluate"]
    results = [result for report in evaluations for result in _results(report, datasets)]
    results += [result for report in kinds[TRAINING] for result in _results(report, datasets)]
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
        title=name.split("/")[-1],
        summary=" ".join([_what_it_is(config), *map(_what_it_does, evaluations[:1])]),
        figure=figure,
        snippet=snippet(config, name),
        exits=_exits_table(config),
        evaluations=list(map(_evaluation, evaluations)),
        calibrations=list(map(_calibration, kinds["lgvit calibrate"])),
        benchmarks=list(map(_benchmark, kinds["lgvit benchmark"])),
        trainings=list(map(_training, kinds[TRAINING])),
        limits=_limits(config, kinds),
    )


def snippet(config: PretrainedConfig, name: str) -> str:
    """Six lines that answer for one image."""
    depth = "blocks" if config.model_type == "avit" else f"of {config.num_blocks} blocks"
    return "\n".join(
        [
            "from PIL import Image",
            "from transformers import AutoImageProcessor, AutoModelForImageClassification",
            "",
            f'processor = AutoImageProcessor.from_pretrained("{name}")',
            f'model = AutoModelForImageClassification.from_pretrained("{name}", trust_remote_code=True).eval()',
            'out = model(**processor(Image.open("photo.png").convert("RGB"), return_tensors="pt"))',
            f'print(model.config.id2label[out.logits.argmax(-1).item()], "after", out.exit_layer.item(), "{depth}")',
        ]
    )


def read_report(report: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """What is in a report, by which command it was written included, as `what`.

    Raises:
        ValueError: It is no report of one of the commands.
        OSError: There is no such file.
    """
    content = report
    if not isinstance(report, Mapping):
        try:
            content = json.loads(Path(report).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{report}: no JSON ({error})") from error
    known = (*REPORTS, TRAINING)
    if not isinstance(content, Mapping) or content.get("what") not in known:
        what = content.get("what") if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{report if content is not report else 'report'}: what={what!r} must be one of {known}")
    return current_names(dict(content))


def reports_beside(folder: str | Path) -> list[Path]:
    """The reports that lie in a checkpoint's folder under the names of `REPORTS`, whichever are there."""
    return [file for name in REPORTS.values() if (file := Path(folder) / name).is_file()]


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
        for result in card.data.eval_results or []
        if "/" in result.dataset_type and result.metric_type == "accuracy"
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else None


def data_name(report: Mapping[str, Any]) -> str:
    """What the data of a report are called: a Hub id, or the last name of a path."""
    data = str(report["data"])
    return Path(data).name if data.startswith((".", "/", "~")) or Path(data).exists() else data


def _config_of(model: str | Path | PreTrainedModel | PretrainedConfig) -> PretrainedConfig:
    if isinstance(model, PretrainedConfig):
        config = model
    else:
        config = model.config if isinstance(model, PreTrainedModel) else read_config(str(model))
    if not has_card(config):
        raise ValueError(f"model type {config.model_type!r}: cards are of {', '.join(HIGHWAYS)} and avit")
    return config


def _check(report: Mapping[str, Any], config: PretrainedConfig, where: str) -> None:
    """Raise `ValueError` where a report is not of this model as it now answers."""
    if report["what"] == TRAINING:
        return
    if config.model_type == "avit":
        raise ValueError(f"{where}: {report['what']} is of a highway, and the model is an avit")
    if report["what"] != "lgvit calibrate":
        depths, ours = [exit["exit_layer"] for exit in report["exits"]], answer_depths(config)
        if depths != ours:
            raise ValueError(f"{where} is of a model that answers at depths {depths}, this one at {ours}")
    policy = report["environment"]["policy"] if report["what"] == "lgvit benchmark" else report["policy"]
    now = build_policy(config.exit_policy, len(config.exits)).to_dict()
    if build_policy(dict(policy), len(config.exits)).to_dict() != now:
        raise ValueError(f"{where} was made under the policy {policy}, and the config says {now}; make it again")


def _what_it_is(config: PretrainedConfig) -> str:
    height, width = height_width(config.image_size)
    images = f"images of {height} x {width} pixels in {config.num_labels} classes"
    if config.model_type == "avit":
        return (
            f"A {FAMILIES[config.backbone]} of {config.num_hidden_layers} blocks for {images}, whose tokens halt one "
            "by one (A-ViT, https://arxiv.org/abs/2112.07658) and then leave the computation."
        )
    family = FAMILIES[config.model_type.removesuffix("_highway")]
    if not config.exits or config.truncated:
        return f"A {family} of {config.num_blocks} blocks for {images}."
    return (
        f"A {family} of {config.num_blocks} blocks for {images}, with "
        f"{_exits_behind(config.exit_positions)}: an image takes only the blocks that it needs, and leaves at the "
        f"first exit where the policy `{config.exit_policy['name']}` is content."
    )


def _what_it_does(report: Mapping[str, Any]) -> str:
    overall = report["overall"]
    full = "" if overall["accuracy_full_model"] is None else f" (the full model {overall['accuracy_full_model']:.1%})"
    return (
        f"Of {overall['samples']:,} {report['split']} images of {data_name(report)} it answers "
        f"{overall['accuracy']:.1%} rightly{full}, after {overall['mean_depth']:.2f} blocks on average."
    )


def _exits_table(config: PretrainedConfig) -> str:
    if config.model_type == "avit" or not config.exits:
        return ""
    rows = [[index, exit.after, exit.head] for index, exit in enumerate(config.exits)]
    rows += [] if config.truncated else [[len(rows), config.num_blocks, "final"]]
    return _table(["exit", "behind block", "head"], rows)


def _evaluation(report: Mapping[str, Any]) -> dict[str, str]:
    overall, machine = report["overall"], report["environment"]
    exits = [
        [index, exit["exit_layer"], exit["head"], f"{exit['samples']:,} ({exit['share']:.0%})"]
        + [_percent(exit["accuracy_exited"]), _percent(exit["accuracy_all"]), f"{exit['macs'] / 1e6:.1f}"]
        for index, exit in enumerate(report["exits"])
    ]
    columns = ["exit", "behind block", "head", "images leaving", "right there", "right of all", "MMACs until there"]
    times = [
        [size, f"{1e3 * time['early_exit_seconds']:.0f}"]
        + ["-" if time["backbone_seconds"] is None else f"{1e3 * time['backbone_seconds']:.0f}"]
        + ["-" if time["wall_clock_speed_up"] is None else f"{time['wall_clock_speed_up']:.2f}x"]
        for size, time in report["wall_clock"].items()
    ]
    timed = _table(["batch size", "early exit, ms", "backbone without heads, ms", "faster"], times)
    return {
        "title": f"Accuracy and cost on {data_name(report)}",
        "exits": _table(columns, exits),
        "overall": (
            f"{overall['samples']:,} {report['split']} images: accuracy {overall['accuracy']:.2%}"
            + _against(overall["accuracy_full_model"])
            + f". Mean depth {overall['mean_depth']:.2f} blocks. {overall['mean_macs'] / 1e6:.1f} million "
            f"multiply-accumulates (MACs) an image, exits counted, where the backbone takes "
            f"{overall['backbone_macs'] / 1e6:.1f} million: {overall['macs_speed_up']:.2f}x."
        ),
        "times": f"{timed}\n\n{_on(machine)}, for {min(256, overall['samples'])} images." if times else "",
    }


def _calibration(report: Mapping[str, Any]) -> dict[str, str]:
    what = {
        "drop": "accuracy drop against the full model",
        "harm": "share of images that only the full model has right",
    }
    rows, n = f"{report['samples']:,} {report['split']} images of {data_name(report)}", f"{report['samples_tested']:,}"
    if report["bound"] == "none":
        promise = (
            f"Nothing is guaranteed: the figures are estimates on {n} of these images, which the search has not seen."
        )
    else:
        points = 100 * report["guaranteed_drop"]
        most = f"{points:g} percentage point{'' if points == 1 else 's'}"
        promise = (
            f"**With probability {1 - report['delta']:g}, the {what[report['bound']]} is at most {most}**, for images "
            f"drawn as these were: tested on {n} of them, which the search has not seen (delta = {report['delta']:g})."
        )
    policy = json.dumps(_rounded(report["policy"]))
    exits = f"exits switched on: {', '.join(map(str, report['exits'])) or 'none'}"
    return {
        "title": "How thresholds were chosen, and what is guaranteed",
        "text": (
            f"Policy `{policy}`, {exits}; chosen by `lgvit calibrate` on {rows}.\n\n{promise}\n\nOn those {n} images: "
            f"accuracy {report['accuracy']:.2%}{_against(report['full_accuracy'])}, mean depth "
            f"{report['mean_depth']:.2f} blocks, {report['mean_macs'] / 1e6:.1f} million MACs an image where the full "
            f"model takes {report['full_macs'] / 1e6:.1f} million."
        ),
    }


def _benchmark(report: Mapping[str, Any]) -> dict[str, str]:
    rows = [
        [entry["batch_size"]]
        + [f"{entry['early_exit'][key]:.2f}" for key in ("p50_ms", "p95_ms", "p99_ms")]
        + [f"{entry['early_exit']['images_per_second']:.1f}", f"{entry['backbone']['p50_ms']:.2f}"]
        + [f"{entry['wall_clock_speed_up']:.2f}x", f"{entry['layer_speed_up']:.2f}x"]
        for entry in report["batches"]
    ]
    columns = ["batch size", "p50 ms", "p95 ms", "p99 ms", "images/s", "backbone, p50 ms", "faster", "by blocks run"]
    about = report["environment"]
    return {
        "title": f"Wall-clock on {data_name(report)}",
        "times": (
            f"{_table(columns, rows)}\n\n{_on(about)}; {about['images']} {report['split']} images, {about['repeats']} "
            "runs each, early exit and the backbone without heads in turn." + _against_static(report) + _noise(report)
        ),
    }


def _against_static(report: Mapping[str, Any]) -> str:
    """The model that early exit must beat: the first exit that is no less accurate, alone."""
    index = report["accuracies"]["static_exit"]
    if index is None:
        return ""
    faster = ", ".join(f"{entry['static_speed_up']:.2f}x" for entry in report["batches"])
    return (
        f" Exit {index} alone, for all images, is no less accurate on these: it is {faster} as fast as the backbone."
    )


def _noise(report: Mapping[str, Any]) -> str:
    noise = max(entry["noise"] for entry in report["batches"])
    if noise <= NOISY:
        return ""
    return f" The machine was busy: the middle half of the backbone's times spreads over {noise:.0%} of their median."


def _training(report: Mapping[str, Any]) -> dict[str, str]:
    figures = report["figures"]
    rows = [[name.replace("_", " "), f"{value:.4f}"] for name, value in figures.items()]
    return {"title": f"Evaluation at step {report['step']} of training", "figures": _table(["figure", "value"], rows)}


def _limits(config: PretrainedConfig, kinds: Mapping[str, Sequence[Any]]) -> list[str]:
    limits = [
        f"It knows {config.num_labels} classes, and answers with one of them whatever the image shows.",
        "It has the errors and the biases of its backbone and of the images that it was trained on.",
    ]
    if config.model_type != "avit" and config.exits and not config.truncated:
        limits.append(
            "A threshold is as good as the images it was chosen on are like yours: calibrate on your own "
            "(`lgvit calibrate`). An exit that is sure and wrong is not asked again."
        )
    if any(report["bound"] != "none" for report in kinds["lgvit calibrate"]):
        limits.append("The guarantee is for images drawn as the calibration images were, and for the mean over them.")
    if kinds["lgvit evaluate"] or kinds["lgvit benchmark"]:
        limits.append("Times are of the machine that is named; on others, measure (`lgvit benchmark`).")
    return limits


def _results(report: Mapping[str, Any], datasets: Sequence[str]) -> list[EvalResult]:
    if report["what"] == TRAINING:
        figures = report["figures"]
        name = report.get("data") or (datasets[0] if datasets else None)
        if name is None or "accuracy" not in figures:
            return []
        return [_result(name, name, None, "accuracy", figures["accuracy"], "Accuracy")]
    overall, name = report["overall"], data_name(report)
    kind = datasets[0] if len(datasets) == 1 else name
    about = {"exit_policy": _rounded(report["policy"])}
    figures = [
        ("accuracy", overall["accuracy"], "Accuracy, leaving early", about),
        ("accuracy", overall["accuracy_full_model"], "Accuracy, full model", None),
        ("mean_depth", overall["mean_depth"], "Mean depth in blocks", about),
        ("macs", overall["mean_macs"], "Mean MACs of an image", about),
    ]
    return [_result(kind, name, report["split"], *figure) for figure in figures if figure[1] is not None]


def _result(
    kind: str, data: str, split: str | None, metric: str, value: float, name: str, about: dict[str, Any] | None = None
) -> EvalResult:
    return EvalResult(
        task_type=TASK,
        dataset_type=kind,
        dataset_name=data,
        dataset_split=split,
        metric_type=metric,
        metric_value=round(value, 6),
        metric_name=name,
        metric_args=about,
    )


def _on(machine: Mapping[str, Any]) -> str:
    device = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}"
    return f"Measured on {device}, {threads}, {machine['dtype']}, {versions}"


def _against(full: float | None) -> str:
    return "" if full is None else f", full model {full:.2%}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _exits_behind(positions: Sequence[int]) -> str:
    *others, last = map(str, positions)
    if not others:
        return f"an early exit behind block {last}"
    return f"early exits behind blocks {', '.join(others)} and {last}"


def _rounded(value: Any) -> Any:
    """Numbers to four digits, for a reader."""
    if isinstance(value, Mapping):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value

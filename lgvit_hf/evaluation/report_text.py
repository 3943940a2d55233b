"""The report of `benchmark` in words and tables: what was gained, and why early exit loses; and a policy in words."""

from __future__ import annotations

from typing import Any, cast

from .report_types import BatchFigures, BenchmarkReport, ExportFacts, Latency

# relative: above the one a measurement is called noisy, above the other a prediction wrong
_NOISY, _WRONG = 0.25, 0.1


def verdict(report: dict[str, Any]) -> list[str]:
    """What a report of `benchmark` comes to, a sentence each: where early exit loses, to what, and what it gains.

    Args:
        report (`dict`): As `benchmark` gives it.
    """
    typed = cast("BenchmarkReport", report)
    lines = [line for entry in typed["batches"] for line in _verdict_on(entry, typed)]
    if typed["exported"] is not None:
        lines.append(
            "an exported segment always runs its head: the times of the backbone, of an exit alone and of exits that "
            "are skipped include the heads"
        )
    return [_verdict_on_accuracy(typed), *lines]


def _verdict_on_accuracy(report: BenchmarkReport) -> str:
    accuracy, samples = report["accuracies"], report["accuracies"]["samples"]
    if accuracy["against"] != "labels":
        return f"early exit agrees with the full model on {accuracy['accuracy']:.1%} of {samples} images"
    right = f"{accuracy['accuracy']:.1%} rightly, the full model {accuracy['accuracy_full_model']:.1%}"
    return f"of {samples} images early exit answers {right}"


def _verdict_on(entry: BatchFigures, report: BenchmarkReport) -> list[str]:
    where, speed_up = f"at batch size {entry['batch_size']}", entry["wall_clock_speed_up"]
    if speed_up < 1:
        lines = [f"{where} early exit is slower than the backbone: {speed_up:.2f}x, because {_reason(entry)}"]
    else:
        lines = [
            f"{where} early exit is {speed_up:.2f}x as fast as the backbone ({entry['layer_speed_up']:.2f}x by blocks "
            f"run), {entry['realised_over_ideal']:.0%} of the ideal"
        ]
    index, static_speed_up = report["accuracies"]["static_exit"], entry["static_speed_up"]
    if index is not None and static_speed_up is not None and static_speed_up > speed_up:
        exit = report["exits"][index]
        lines.append(
            f"{where} the static model that ends at exit {index}, depth {exit['exit_layer']}, is faster and no less "
            f"accurate: {static_speed_up:.2f}x, accuracy {exit['accuracy_all']:.1%}"
        )
    if entry["noise"] > _NOISY:
        lines.append(
            f"{where} the machine was too busy to trust this: the middle half of the backbone's times spreads over "
            f"{entry['noise']:.0%} of their median"
        )
    elif abs(entry["predicted_over_measured"] - 1) > _WRONG:
        lines.append(
            f"{where} the cost table does not hold: it predicts {entry['predicted_ms']:.2f} ms, and "
            f"{entry['early_exit']['mean_ms']:.2f} ms were measured"
        )
    return lines


def _reason(entry: BatchFigures) -> str:
    saved, heads = entry["saved_share"], entry["heads_share"]
    if heads >= saved:
        return f"evaluating the heads adds {heads:.0%} of its time, and the blocks not run save {saved:.0%}"
    return (
        f"fewer samples do not take proportionately less time: it would be {entry['ideal_speed_up']:.2f}x if each "
        "sample cost its share of the whole batch"
    )


def benchmark_as_text(report: dict[str, Any]) -> str:
    """The report of `benchmark` as tables for a terminal, and its verdict."""
    typed = cast("BenchmarkReport", report)
    parts = (_environment_text, _batches_text, _exits_text, _profile_text, _sizes_text)
    return "\n\n".join([*(part(typed) for part in parts), "\n".join(verdict(report))])


def _environment_text(report: BenchmarkReport) -> str:
    about = report["environment"]
    return (
        f"{about['model']}\npolicy {policy_in_words(about['policy'])}\n"
        f"{about['device']}, threads: {about['threads']}; torch {about['torch']}, transformers "
        f"{about['transformers']}; {about['images']} images, {about['repeats']} runs each, in turn"
    )


def _batches_text(report: BenchmarkReport) -> str:
    lines = ["batch size  run             p50 ms    p95 ms    p99 ms   mean ms  images/s  wall-clock  by blocks run"]
    depths, static = [exit["exit_layer"] for exit in report["exits"]], report["accuracies"]["static_exit"]
    for entry in report["batches"]:
        rows: list[tuple[str, Latency, float | None, str]] = [
            ("early exit", entry["early_exit"], entry["wall_clock_speed_up"], f"{entry['layer_speed_up']:.2f}x"),
            ("- ideal", {"mean_ms": entry["ideal_ms"]}, entry["ideal_speed_up"], ""),
            ("- predicted", {"mean_ms": entry["predicted_ms"]}, None, ""),
            ("backbone", entry["backbone"], 1.0, "1.00x"),
        ]
        if static is not None and entry["static"] is not None:
            layers = f"{depths[-1] / depths[static]:.2f}x"
            rows.append((f"exit {static} alone", entry["static"], entry["static_speed_up"], layers))
        for number, (name, times, speed_up, layers) in enumerate(rows):
            size = "" if number else str(entry["batch_size"])
            figures = (times.get("p50_ms"), times.get("p95_ms"), times.get("p99_ms"), times.get("mean_ms"))
            numbers = "".join(_cell(figure, 10) for figure in figures)
            wall_clock = "" if speed_up is None else f"{speed_up:.2f}x"
            images = "" if "images_per_second" not in times else f"{times['images_per_second']:.1f}"
            lines.append(f"{size:>10}  {name:12}{numbers}{images:>10}{wall_clock:>12}{layers:>15}".rstrip())
    return "\n".join(lines)


def _exits_text(report: BenchmarkReport) -> str:
    lines = ["exit  layer  head         samples    p50 ms    p95 ms    p99 ms   (images one at a time)"]
    for exit in report["exits"]:
        numbers = "".join(_cell(figure, 10) for figure in (exit["p50_ms"], exit["p95_ms"], exit["p99_ms"]))
        lines.append(f"{exit['exit_index']:4}  {exit['exit_layer']:5}  {exit['head']:14}{exit['samples']:6}{numbers}")
    return "\n".join(lines)


def _profile_text(report: BenchmarkReport) -> str:
    sizes = list(report["profile"][0]["ms"])
    lines = [f"{'part':23}depth     MMACs   parameters" + "".join(f"  ms, batch {size:>4}" for size in sizes)]
    for row in report["profile"]:
        times = "".join(_cell(row["ms"][size], 16, 3) for size in sizes)
        lines.append(f"{row['part']:22}{row['depth']:6}{row['macs'] / 1e6:10.2f}{_count(row['parameters'])}{times}")
    return "\n".join(lines)


def _sizes_text(report: BenchmarkReport) -> str:
    memory, parameters, exported = report["memory"], report["parameters"], report["exported"]
    if exported is not None:
        return f"files       {export_in_words(exported)}; parameters and memory are not known"
    assert memory is not None and parameters is not None, "they are of a model of PyTorch"
    return (
        f"parameters  {parameters['total']:,}: stem {parameters['stem']:,}, blocks {parameters['blocks']:,}, final "
        f"classifier {parameters['final']:,}, heads {sum(parameters['heads']):,}\n"
        f"memory      early exit {memory['early_exit_bytes'] / 1e6:.1f} MB, backbone "
        f"{memory['backbone_bytes'] / 1e6:.1f} MB at batch size {memory['batch_size']} ({memory['what']})"
    )


def export_in_words(exported: ExportFacts) -> str:
    """The facts of an exported highway."""
    what = f"{exported['file_bytes'] / 1e6:.1f} MB of ONNX, layout {exported['layout']}"
    return f"{what}, {exported['precision']}, in {exported['runtime']}"


def _count(number: int | None) -> str:
    return f"{'-':>13}" if number is None else f"{number:13,}"


def _cell(value: float | None, width: int, digits: int = 2) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def policy_in_words(settings: dict[str, Any]) -> str:
    """A policy's settings for a reader, numbers to four digits; without what was fitted to a table, such as a gate.

    Example:

        >>> policy_in_words({"name": "confidence", "threshold": [0.91234, 1.0], "temperature": 1.0})
        'confidence: threshold 0.9123 1; temperature 1'
    """
    numbers = "; ".join(f"{name} {_short(value)}" for name, value in settings.items() if _is_short(name, value))
    return f"{settings['name']}: {numbers}" if numbers else settings["name"]


def _is_short(name: str, value: Any) -> bool:
    fitted = isinstance(value, (list, tuple)) and any(isinstance(each, (list, dict)) for each in value)
    return name not in ("name", "num_labels") and not fitted


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)

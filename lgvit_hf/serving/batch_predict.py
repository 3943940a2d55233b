"""Folders, files or a dataset of images answered into one file, by one process or several; goes on after a kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..data.settings import check_counts
from ..files import locked, replace_file, write_json
from .answer_files import COLUMNS, check_format, write_predictions
from .image_sources import Images, Source, find_images
from .predictor import Predictor
from .ray_cluster import check_ray
from .ray_data import ShardAnswers, answered_by_ray

Row = dict[str, Any]  # of the output, by column
ENGINES = ("local", "ray")
SHARD = 256  # about so many images are answered before they are kept
_here: _Work  # of a process that answers for another


def run_predict(
    checkpoint: str,
    paths: Sequence[str],
    output: str,
    *,
    policy: dict[str, Any] | None = None,
    split: str | None = None,
    batch_size: int = 64,
    workers: int = 1,
    top_k: int | None = None,
    probabilities: bool = False,
    runtime: str | None = None,
    engine: str = "local",
) -> dict[str, Any]:
    """Answer images, a row of `output` each; what cannot be read is a row with an `error`.

    Until it is whole, the answers are kept in the folder `output` + `.parts`, from which the same call goes on.

    Args:
        checkpoint (`str`): See `Predictor`.
        paths (`Sequence[str]`):
            Images, folders of them (searched through), or patterns such as `"photos/**/*.png"`; or one dataset, see
            `load_encoded`: `digits`, a Parquet file, a folder of those, a Hub id.
        output (`str`):
            A `.parquet`, `.csv` or `.jsonl` file with the columns `path`, `label`, `score` (the label's probability),
            `exit_layer`, `exit_index`, `exit_score` and `error`. An image inside a dataset has as path its split and
            number, from 0.
        policy (`dict`, *optional*): Instead of the saved one.
        split (`str`, *optional*): Of a dataset that has several.
        batch_size (`int`, *optional*, defaults to 64): Images that run at once.
        workers (`int`, *optional*, defaults to 1):
            Processes; several have one thread each, one has as many as PyTorch uses.
        top_k (`int`, *optional*): Also write the most probable labels, `top_labels` and `top_scores`.
        probabilities (`bool`, *optional*, defaults to `False`): Also write those of all labels, in the model's order.
        runtime (`str`, *optional*): Of an exported highway, see `open_exported`.
        engine (`str`, *optional*, defaults to `"local"`):
            `"ray"`: the workers are actors of Ray Data, each with one thread, on the cluster of `RAY_ADDRESS` or on
            this machine. They read the checkpoint and the images by the same paths.

    Returns:
        `dict`: `images`, `errors`, `mean_depth`, `num_blocks`, `answered_now`, `images_per_second` (of those).

    Raises:
        ValueError:
            No images there; `output` is there already, or another run makes it; its parts are of another model,
            policy, class names, images that have changed since ...
        OSError: There is no saved model; a process died.
        ImportError: The extra `ray` is not installed.
        KeyboardInterrupt: Stopped; says how to go on.
    """
    target = Path(output)
    check_format(target)
    check_counts(batch_size=[batch_size], workers=[workers])
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is none of {', '.join(ENGINES)}")
    if engine == "ray":
        check_ray("data")
    with locked(target):
        if target.exists():
            raise ValueError(f"{output} is there already; choose another output, or delete it")
        images = find_images(paths, split)
        predictor = Predictor(checkpoint, policy, max_batch_size=batch_size, runtime=runtime)
        work = _Work(predictor, predictor.label_names, top_k, probabilities)
        return _predict(work, images, target, workers, engine)


def _predict(work: _Work, images: Images, target: Path, workers: int, engine: str) -> Row:
    predictor, opened, labels, top_k = work.predictor, work.predictor.opened, work.labels, work.top_k
    if not opened.takes_images:
        raise OSError(f"{predictor.path} has no image processor (preprocessor_config.json)")
    if top_k is not None and not 1 <= top_k <= len(labels):
        raise ValueError(f"top_k={top_k} must be from 1 to {len(labels)}, the labels of {predictor.path}")
    left_out = {"top_labels": top_k is None, "top_scores": top_k is None, "probabilities": not work.probabilities}
    columns = [name for name in COLUMNS if not left_out.get(name)]
    parts = target.with_name(f"{target.name}.parts")
    size = predictor.max_batch_size * max(1, SHARD // predictor.max_batch_size)
    plan = {
        "what": "lgvit predict",
        "model": opened.digest,
        "runtime": predictor.runtime,
        "policy": opened.policy,
        "image processor": opened.processor_digest,
        "class names": labels,
        "images": images.digest(),
        "batch_size": predictor.max_batch_size,
        "images per part": size,
        "top_k": top_k,
        "probabilities": work.probabilities,
    }
    _begin(parts, plan)
    shards = {
        parts / f"{number:06}.jsonl": range(len(images))[start : start + size]
        for number, start in enumerate(range(0, len(images), size))
    }
    waiting = {file: numbers for file, numbers in shards.items() if not file.exists()}
    answered, started = sum(map(len, waiting.values())), time.perf_counter()
    _answer(work, images, waiting, columns, workers, engine)
    seconds, depths = time.perf_counter() - started, Counter[int | None]()
    with replace_file(target) as file:
        write_predictions(file, _counted(shards, depths), columns, target.suffix)
    shutil.rmtree(parts)
    errors = depths.pop(None, 0)
    return {
        "images": len(images),
        "errors": errors,
        "mean_depth": sum((depth or 0) * samples for depth, samples in depths.items()) / max(1, depths.total()),
        "num_blocks": opened.depths[-1],
        "answered_now": answered,
        "images_per_second": answered / seconds,
    }


def _answer(
    work: _Work, images: Images, waiting: dict[Path, range], columns: Sequence[str], workers: int, engine: str
) -> None:
    """Answer the images of each file and write it, all of it or nothing."""
    kept, answer = len(images) - sum(map(len, waiting.values())), _answered if engine == "local" else _by_ray
    try:
        with (
            tqdm(total=len(images), initial=kept, unit=" images", desc="predict", leave=False) as progress,
            closing(answer(work, images, waiting, min(workers, len(waiting)))) as answered,
        ):
            for file, rows in answered:
                with replace_file(file) as temporary:
                    write_predictions(temporary, rows, columns, ".jsonl")
                kept += len(rows)
                progress.update(len(rows))
    except (KeyboardInterrupt, BrokenProcessPool) as error:
        there = f"{kept} of {len(images)} images are kept in {next(iter(waiting)).parent}; the same command goes on"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"stopped; {there}") from error
        raise OSError(
            f"a worker process died, perhaps for want of memory; {there}, with fewer --workers if need be"
        ) from error


def _counted(files: Iterable[Path], depths: Counter[int | None]) -> Iterator[Row]:
    """All rows; counts on the way how many have which depth, unreadable ones under `None`."""
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                depths[row["exit_layer"]] += 1
                yield row


def _begin(parts: Path, plan: Row) -> None:
    """Make the folder of parts, or go on with one that was made for the same."""
    file = parts / "plan.json"
    if not file.exists():
        if parts.exists() and any(not entry.name.startswith(".") for entry in parts.iterdir()):
            raise ValueError(f"{parts} is there already, and not of lgvit predict; choose another output")
        write_json(file, plan)
        return
    try:
        begun = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete the folder to begin again") from error
    for name, value in plan.items():
        if begun.get(name) != value:
            old, new = (json.dumps(found)[:80] for found in (begun.get(name), value))
            raise ValueError(
                f"{parts} was begun with another {name}: {old}, not {new}; go on with that, choose another output, or "
                "delete the folder to begin again"
            )


# -- the work --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """What is done to a shard, in whichever process."""

    predictor: Predictor
    labels: list[str]
    top_k: int | None
    probabilities: bool

    def __call__(self, shard: list[Source]) -> list[Row]:
        rows, read, pixels = list[Row](), list[Row](), []
        for path, source in shard:
            row: Row = {"path": _text(path)}
            try:
                if source is None:
                    raise ValueError("the dataset has no image here")
                pixels.append(self.predictor.pixel_values(source))
                read.append(row)
            except ValueError as error:
                row["error"] = _text(str(error))
            rows.append(row)
        if read:
            answers = self.predictor({"pixel_values": np.stack(pixels)})
            chances = self.predictor.probabilities(answers)
            for number, row in enumerate(read):
                answer = {name: column[number] for name, column in answers.items()}
                if np.isfinite(answer["logits"]).all():
                    row.update(self._row(answer, chances[number]))
                else:
                    row["error"] = "the model's logits for it are not finite"
        return rows

    def _row(self, answer: dict[str, Any], chances: np.ndarray) -> Row:
        row: Row = {
            "label": self.labels[answer["label"]],
            "score": _number(chances[answer["label"]]),
            "exit_layer": int(answer["exit_layer"]),
            "exit_index": int(answer["exit_index"]),
            "exit_score": _number(answer["exit_score"]),
        }
        if self.top_k is not None:
            best = np.argsort(-answer["logits"], kind="stable")[: self.top_k]
            row["top_labels"] = [self.labels[label] for label in best]
            row["top_scores"] = [_number(chances[label]) for label in best]
        if self.probabilities:
            row["probabilities"] = [_number(chance) for chance in chances]
        return row


def _number(value: np.float32) -> float | None:
    """The shortest number that is this one in float32; nothing for what JSON has no word for."""
    return float(str(value)) if np.isfinite(value) else None


def _text(text: str) -> str:
    """A path that is no UTF-8 can be opened, but not be written."""
    return text.encode("utf-8", "replace").decode("utf-8")


Answered = Generator[tuple[Path, list[Row]], None, None]


def _by_ray(work: _Work, images: Images, waiting: dict[Path, range], workers: int) -> Answered:
    """The rows of each shard with its file, as they come from the actors of Ray Data."""
    if not waiting:
        return
    work.predictor.threads, files = 1, list(waiting)
    answers = ShardAnswers(work, images, list(waiting.values()))
    yield from ((files[shard], rows) for shard, rows in answered_by_ray(answers, workers))


def _answered(work: _Work, images: Images, waiting: dict[Path, range], workers: int) -> Answered:
    """The rows of each shard with its file: in order here, or as they come from several processes."""
    tasks = ((file, [images[number] for number in numbers]) for file, numbers in waiting.items())
    if workers <= 1:
        yield from ((file, work(shard)) for file, shard in tasks)
        return
    context = multiprocessing.get_context("spawn")
    # what reads its end is told when this process stops, in whatever way
    reader, writer = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(work, reader))
    running = dict[Future[list[Row]], Path]()
    try:
        while True:
            # a few wait, so that no process does; not all, for they hold images
            for file, shard in islice(tasks, 2 * workers - len(running)):
                running[pool.submit(_run_here, shard)] = file
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
        pool.shutdown()
    finally:
        writer.close()
        pool.shutdown(cancel_futures=True)


def _start_worker(work: _Work, reader: Connection) -> None:
    global _here
    # Ctrl-C is for the first process, which tells the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_stop_with, args=(reader,), daemon=True).start()
    # what there is to say of opening the checkpoint, the first process has said; transformers reads this when imported
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    # several processes with several threads each would wait for one another
    work.predictor.threads = 1
    _here = work


def _run_here(shard: list[Source]) -> list[Row]:
    return _here(shard)


def _stop_with(reader: Connection) -> None:
    try:
        reader.recv()
    except EOFError:
        os._exit(1)

"""Folders, files or a dataset of images answered into one file, by one process or several; goes on after a kill."""

from __future__ import annotations

import glob
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from ..data.datasets import load_encoded
from ..data.folders import is_archive, is_saved
from ..data.settings import check_counts
from ..evaluation.exit_table import weights_digest
from ..files import file_stamp, locked, replace_file, write_json
from .answer_files import COLUMNS, check_format, write_predictions
from .device.rgb import IMAGE_FORMATS
from .predictor import Predictor

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
) -> dict[str, Any]:
    """Answer images, a row of `output` each; what cannot be read is a row with an `error`.

    Until it is whole, the answers are kept in the folder `output` + `.parts`, from which the same call goes on.

    Args:
        checkpoint (`str`): See `Predictor`.
        paths (`Sequence[str]`):
            Images, folders of them (searched through), or patterns such as `"photos/**/*.png"`; or one dataset, as of
            `load_encoded`: `digits`, a Parquet file, a folder of those, a Hub id.
        output (`str`):
            A `.parquet`, `.csv` or `.jsonl` file with the columns `path`, `label`, `score` (the label's probability),
            `exit_layer`, `exit_index`, `exit_score` and `error`. An image inside a dataset has as path its split and
            row, from 0.
        policy (`dict`, *optional*): Instead of the saved one.
        split (`str`, *optional*): Of a dataset that has several.
        batch_size (`int`, *optional*, defaults to 64): Images that run at once.
        workers (`int`, *optional*, defaults to 1):
            Processes; several have one thread each, one has as many as PyTorch uses.
        top_k (`int`, *optional*): Also write the most probable labels, `top_labels` and `top_scores`.
        probabilities (`bool`, *optional*, defaults to `False`): Also write those of all labels, in the model's order.

    Returns:
        `dict`: `images`, `errors`, `mean_depth`, `num_blocks`, `answered_now`, `images_per_second` (of those).

    Raises:
        ValueError:
            No images there; `output` is there already, or another run makes it; its parts are of another model,
            policy, class names, images that have changed since ...
        OSError: There is no saved model; a process died.
        KeyboardInterrupt: Stopped; says how to go on.
    """
    target = Path(output)
    check_format(target)
    check_counts(batch_size=[batch_size], workers=[workers])
    with locked(target):
        if target.exists():
            raise ValueError(f"{output} is there already; choose another output, or delete it")
        images = _find_images(paths, split)
        predictor = Predictor(checkpoint, policy, max_batch_size=batch_size)
        return _predict(predictor, images, target, workers, top_k, probabilities)


def _predict(
    predictor: Predictor, images: _Images, target: Path, workers: int, top_k: int | None, probabilities: bool
) -> dict[str, Any]:
    batch_size = predictor.max_batch_size
    labels = predictor.label_names
    if top_k is not None and not 1 <= top_k <= len(labels):
        raise ValueError(f"top_k={top_k} must be from 1 to {len(labels)}, the labels of {predictor.path}")
    columns = [
        name
        for name in COLUMNS
        if (top_k is not None or not name.startswith("top_")) and (probabilities or name != "probabilities")
    ]
    parts = target.with_name(f"{target.name}.parts")
    size = batch_size * max(1, SHARD // batch_size)
    _begin(
        parts,
        {
            "model": weights_digest(predictor.model),
            "policy": predictor.model.exit_policy.to_dict(),
            "image processor": hashlib.sha256(predictor.processor.to_json_string().encode()).hexdigest(),
            "class names": labels,
            "images": images.digest(),
            "batch_size": batch_size,
            "images per part": size,
            "top_k": top_k,
            "probabilities": probabilities,
        },
    )
    shards = {
        parts / f"{number:06}.jsonl": range(start, min(start + size, len(images)))
        for number, start in enumerate(range(0, len(images), size))
    }
    waiting = {file: rows for file, rows in shards.items() if not file.exists()}
    work, started = _Work(predictor, tuple(labels), top_k, probabilities), time.perf_counter()
    _answer(work, images, waiting, columns, workers)
    seconds, depths = time.perf_counter() - started, Counter()
    answered = sum(map(len, waiting.values()))
    with replace_file(target) as file:
        write_predictions(file, _counted(shards, depths), columns, target.suffix)
    shutil.rmtree(parts)
    errors = depths.pop(None, 0)
    return {
        "images": len(images),
        "errors": errors,
        "mean_depth": sum(depth * rows for depth, rows in depths.items()) / max(1, len(images) - errors),
        "num_blocks": predictor.model.config.num_blocks,
        "answered_now": answered,
        "images_per_second": answered / seconds,
    }


def _answer(work: _Work, images: _Images, waiting: dict[Path, range], columns: Sequence[str], workers: int) -> None:
    """Answer the images of each file and write it, all of it or nothing."""
    if not waiting:
        return
    kept = len(images) - sum(map(len, waiting.values()))
    tasks = ((file, images.rows(numbers)) for file, numbers in waiting.items())
    try:
        with logging.tqdm(total=len(images), initial=kept, unit=" images", desc="predict", leave=False) as progress:
            with closing(_answered(work, tasks, min(workers, len(waiting)))) as answered:
                for file, rows in answered:
                    with replace_file(file) as temporary:
                        write_predictions(temporary, rows, columns, ".jsonl")
                    kept += len(rows)
                    progress.update(len(rows))
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(f"stopped; {_kept(kept, images, waiting)}") from stopped
    except BrokenProcessPool as died:
        raise OSError(
            f"a worker process died, perhaps for want of memory; {_kept(kept, images, waiting)}, with fewer --workers "
            "if need be"
        ) from died


def _kept(kept: int, images: _Images, waiting: dict[Path, range]) -> str:
    folder = next(iter(waiting)).parent
    return f"{kept} of {len(images)} images are kept in {folder}; the same command goes on"


def _counted(files: Iterable[Path], depths: Counter[int | None]) -> Iterator[dict[str, Any]]:
    """All rows; counts on the way how many have which depth, unreadable ones under `None`."""
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                depths[row["exit_layer"]] += 1
                yield row


def _begin(parts: Path, plan: dict[str, Any]) -> None:
    """Make the folder of parts, or go on with one that was made for the same."""
    plan, file = {"what": "lgvit predict", **plan}, parts / "plan.json"
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


# -- the images ------------------------------------------------------------------------------------------------


class _Images(Protocol):
    """Images by number, each with what its row calls it."""

    def __len__(self) -> int: ...

    def rows(self, numbers: range) -> list[tuple[str, str | bytes | None]]:
        """Path and file, or path and content; `None` where the dataset has no image."""

    def digest(self) -> str:
        """By which other images are known."""


@dataclass(frozen=True)
class _Files:
    files: list[str]

    def __len__(self) -> int:
        return len(self.files)

    def rows(self, numbers: range) -> list[tuple[str, str | bytes | None]]:
        return [(self.files[number], self.files[number]) for number in numbers]

    def digest(self) -> str:
        return _stamped(self.files)


@dataclass(frozen=True)
class _Dataset:
    source: str
    split: str | None
    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self, numbers: range) -> list[tuple[str, str | bytes | None]]:
        images = self.dataset[numbers.start : numbers.stop]["image"]
        prefix = f"{self.split}/" if self.split else ""
        return [self._row(f"{prefix}{number}", image or {}) for number, image in zip(numbers, images, strict=True)]

    @staticmethod
    def _row(name: str, image: dict[str, Any]) -> tuple[str, str | bytes | None]:
        path, content = image.get("path"), image.get("bytes")
        return (path, path) if content is None and path is not None else (name, content)

    def digest(self) -> str:
        place = Path(self.source)
        files = sorted(map(str, place.rglob("*"))) if place.is_dir() else [self.source] if place.exists() else []
        # of what is not on this disk, `datasets` knows which version it holds
        known = _stamped(files) if files else self.dataset._fingerprint
        return f"{len(self)} images of {self.source}, {self.split}: {known}"


def _stamped(files: Sequence[str]) -> str:
    """A digest of files by name, size and time of change."""
    stamps = (os.fsencode(file) + b"\0" + file_stamp(file).encode() for file in files)
    return hashlib.sha256(b"\0".join(stamps)).hexdigest()


def _find_images(paths: Sequence[str], split: str | None) -> _Images:
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in IMAGE_FORMATS}
    if len(paths) == 1 and _is_dataset(paths[0], known):
        return _Dataset(paths[0], split, load_encoded(paths[0], split))
    if split is not None:
        raise ValueError(f"--split {split} goes with a dataset, not with files or folders")
    files = dict.fromkeys(file for path in paths for file in _files_of(path, known))
    return _Files(list(files))


def _is_dataset(path: str, known: set[str]) -> bool:
    """Whether this is no image file: Parquet, an archive, a saved dataset, or written as the name of a Hub set."""
    place = Path(path)
    if place.is_dir():
        # beside images it may be predictions of them
        return (is_saved(place) or any(place.rglob("*.parquet"))) and not any(_walk(path, known))
    if place.exists() or is_archive(path) or place.suffix.lower() in {".parquet", *known}:
        return place.exists() and (place.suffix == ".parquet" or is_archive(path))
    return not (glob.has_magic(path) or path.startswith((".", "/", "~")) or path.count("/") > 1)


def _files_of(path: str, known: set[str]) -> list[str]:
    """The files that one argument stands for; an image of any suffix may be named itself."""
    place = Path(path)
    if place.is_dir():
        files = sorted(_walk(path, known))
        if not files:
            raise ValueError(f"{path}: no images in this folder")
        return files
    if place.exists():
        if place.suffix == ".parquet" or is_archive(path):
            raise ValueError(f"{path} is a dataset; give it alone")
        return [path]
    if not glob.has_magic(path):
        raise ValueError(f"{path}: no such file or folder")
    found = sorted(glob.glob(path, recursive=True))
    files = [file for file in found if os.path.isfile(file)]
    if not files:
        raise ValueError(f"{path}: no file matches")
    return files


def _walk(folder: str, known: set[str]) -> Iterator[str]:
    """Images of a folder and all below it, links followed once; hidden files and pipes are no images.

    A folder that cannot be read stands among them, and its row says why.
    """
    seen, unreadable = set(), []
    for place, folders, files in os.walk(folder, onerror=unreadable.append, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            file = os.path.join(place, name)
            # a link to nothing is one that cannot be read; what exists and is no file would be waited for
            if Path(name).suffix.lower() in known and not name.startswith(".") and not _is_pipe(file):
                yield file
    yield from (str(error.filename) for error in unreadable)


def _is_pipe(file: str) -> bool:
    return os.path.exists(file) and not os.path.isfile(file)


# -- the work --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """What is done to a shard, in whichever process."""

    predictor: Predictor
    labels: tuple[str, ...]
    top_k: int | None
    probabilities: bool

    def __call__(self, shard: list[tuple[str, str | bytes | None]]) -> list[dict[str, Any]]:
        rows, read, pixels = [], [], []
        for path, source in shard:
            row = {"path": _text(path)}
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
                    row["error"] = "what the model makes of it are no numbers"
        return rows

    def _row(self, answer: dict[str, Any], chances: np.ndarray) -> dict[str, Any]:
        row = {
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


def _answered(
    work: _Work, tasks: Iterator[tuple[Path, list[tuple[str, str | bytes | None]]]], workers: int
) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """The rows of each shard with its file: in order here, or as they come from several processes."""
    if workers <= 1:
        for file, shard in tasks:
            yield file, work(shard)
        return
    context = multiprocessing.get_context("spawn")
    # what reads its end is told when this process stops, in whatever way
    reader, writer = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(work, reader))
    try:
        running = {}
        for file, shard in tasks:
            running[pool.submit(_run_here, shard)] = file
            # a few wait, so that nobody does; not all, for they hold images
            if len(running) >= 2 * workers:
                yield from _finished(running)
        while running:
            yield from _finished(running)
        pool.shutdown()
    finally:
        writer.close()
        pool.shutdown(cancel_futures=True)


def _finished(running: dict[Future, Path]) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        yield running.pop(future), future.result()


def _start_worker(work: _Work, reader: Connection) -> None:
    global _here
    # Ctrl-C is for the first process, which tells the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_stop_with, args=(reader,), daemon=True).start()
    # what there is to say of opening the checkpoint, the first process has said
    logging.set_verbosity_error()
    # several processes with several threads each would wait for one another
    torch.set_num_threads(1)
    _here = work


def _run_here(shard: list[tuple[str, str | bytes | None]]) -> list[dict[str, Any]]:
    return _here(shard)


def _stop_with(reader: Connection) -> None:
    try:
        reader.recv()
    except EOFError:
        os._exit(1)

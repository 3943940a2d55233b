"""Answers already given, read from what `lgvit predict` writes: Parquet, CSV or JSON lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .answer_files import SUFFIXES


class Answered(NamedTuple):
    """One answer; `harm`, whether the full model answers otherwise, where the sample was audited."""

    exit_index: int
    label: str
    harm: bool | None


def read_answers(file: str | Path) -> Iterator[Answered]:
    r"""The answers of a file in its order, without the rows of what could not be read.

    The columns are `exit_index`, `label` and, where there is one, `harm`; others are not looked at.

    Raises:
        ValueError: Unknown suffix, a column is missing, or a row is none; says which.
        ImportError: A `.parquet` file, and pyarrow is not installed.

    Example:

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "predictions.csv"
        ...     _ = file.write_text("path,label,exit_index,error\na.png,cat,2,\nb.png,,,unreadable\n")
        ...     list(read_answers(file))
        [Answered(exit_index=2, label='cat', harm=None)]
    """
    file = Path(file)
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file}: answers are read from {', '.join(SUFFIXES)}, as lgvit predict writes them")
    rows, number = _rows(file), 1
    try:
        while (row := next(rows, None)) is not None:
            if row["exit_index"] is not None and row["label"] is not None:
                yield _answered(row)
            number += 1
    except KeyError as missing:
        raise ValueError(f"{file}, row {number}: there is no {missing}, as lgvit predict writes it") from None
    except (AttributeError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{file}, row {number}: no answer as lgvit predict writes it ({error})") from error


def _answered(row: dict[str, Any]) -> Answered:
    answered = Answered(row["exit_index"], row["label"], row.get("harm"))
    right = type(answered.exit_index) is int, isinstance(answered.label, str), answered.harm in (True, False, None)
    if not all(right):
        raise ValueError(", ".join(f"{name}={value!r}" for name, value in answered._asdict().items()))
    return answered


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix == ".parquet":
        yield from _parquet(file)
        return
    with file.open(encoding="utf-8", newline="") as stream:
        if file.suffix == ".jsonl":
            yield from (dict(json.loads(line)) for line in stream)
            return
        for row in csv.DictReader(stream):
            numbers = {name: json.loads(row[name] or "null") for name in ("exit_index", "harm") if name in row}
            yield {"label": row["label"] or None, **numbers}


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ImportError('Parquet is read by pyarrow: pip install "lgvit-hf[train]"') from error
    try:
        with parquet.ParquetFile(file) as content:
            there = [name for name in Answered._fields if name in content.schema_arrow.names]
            for batch in content.iter_batches(columns=there):
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise ValueError(str(error)) from error

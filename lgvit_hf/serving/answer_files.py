"""Rows of predictions as one file: Parquet, CSV or JSON lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

# by the suffix of the file
SUFFIXES = (".parquet", ".csv", ".jsonl")
# Parquet's type of each column, in their order
COLUMNS = {
    "path": "string",
    "label": "string",
    "score": "float32",
    "exit_layer": "int32",
    "exit_index": "int32",
    "exit_score": "float32",
    "top_labels": "list<string>",
    "top_scores": "list<float32>",
    "probabilities": "list<float32>",
    "error": "string",
}
ROWS_IN_MEMORY = 10_000
Row = dict[str, object]  # by column


def check_format(output: Path) -> None:
    """Raise where predictions cannot be written to a file of this name.

    Raises:
        ImportError: pyarrow is needed and not installed.
        ValueError: Unknown suffix.
    """
    if output.suffix not in SUFFIXES:
        raise ValueError(f"{output}: predictions are written as {', '.join(SUFFIXES)}; choose one of these suffixes")
    if output.suffix == ".parquet":
        _require_pyarrow()


def write_predictions(file: Path, rows: Iterable[Row], columns: Sequence[str], suffix: str = ".parquet") -> None:
    r"""Write rows as they come; a value that a row does not have is null, and nothing in CSV.

    Args:
        file (`Path`): To write, whatever its name.
        rows (`Iterable[dict]`): By column.
        columns (`Sequence[str]`): Of `COLUMNS`.
        suffix (`str`, *optional*, defaults to `".parquet"`): One of `SUFFIXES`; lists are JSON in a cell of CSV.

    Example:

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "predictions"
        ...     write_predictions(file, [{"path": "a.png", "label": "cat"}], ["path", "label", "error"], ".csv")
        ...     file.read_text()
        'path,label,error\na.png,cat,\n'
    """
    if suffix == ".parquet":
        _write_parquet(file, iter(rows), columns)
        return
    with file.open("w", encoding="utf-8", newline="") as stream:
        if suffix == ".jsonl":
            for row in rows:
                stream.write(
                    json.dumps({name: row.get(name) for name in columns}, ensure_ascii=False, allow_nan=False) + "\n"
                )
            return
        # by this end of a line, cells with a carriage return are quoted; written is the newline alone
        table = csv.writer(_Lines(stream), lineterminator="\r\n")
        table.writerow(columns)
        for row in rows:
            table.writerow([_cell(row.get(name)) for name in columns])


class _Lines:
    """What `csv` writes, each line ended by a newline alone."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, line: str) -> None:
        self._stream.write(line.removesuffix("\r\n") + "\n")


def _write_parquet(file: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    pyarrow, parquet = _require_pyarrow()
    types: dict[str, object] = {name: getattr(pyarrow, name)() for name in ("float32", "int32", "string")}
    types |= {f"list<{name}>": pyarrow.list_(kind) for name, kind in types.items()}
    schema = pyarrow.schema([(name, types[COLUMNS[name]]) for name in columns])
    with parquet.ParquetWriter(file, schema) as writer:
        while group := list(islice(rows, ROWS_IN_MEMORY)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


def _cell(value: object) -> object:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


def _require_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            'Parquet is written by pyarrow: pip install "lgvit-hf[train]"; .csv and .jsonl need nothing'
        ) from error
    return pyarrow, pyarrow.parquet

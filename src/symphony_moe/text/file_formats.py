"""Files of text -> their rows: a reader for each format."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from symphony_moe.text.rows import without_empty


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of a file's lines. Raises ValueError for one that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"line {number} is not UTF-8 (byte {error.object[error.start]:#04x} at its "
                    f"position {error.start}); save the file as UTF-8"
                ) from None


def _read_txt(path: Path) -> Iterator[tuple[str, str]]:
    """Documents separated by blank lines."""
    lines: list[str] = []
    for _, line in _lines(path):
        if line.strip():
            # Line breaks as Python reads them in text.
            lines.append(line.replace("\r\n", "\n"))
        elif lines:
            yield "", "".join(lines)
            lines = []
    if lines:
        yield "", "".join(lines)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:  # no JSON, or a number of thousands of digits
                raise ValueError(f"line {number}: {error}") from None
            except RecursionError:
                raise ValueError(f"line {number} is nested too deeply") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", of_columns(row)
    except (pyarrow.ArrowException, OverflowError, RecursionError) as error:
        raise ValueError(f"row {number + 1}: {error}") from None


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}
"""Ending of a file's name -> what reads it: (place, row) one after another. Raises OSError or
ValueError, with the line or row, for what it cannot read."""


def of_columns(row: Any) -> Any:
    """A row of a columnar file as it was before it was stored: such files give every table in a
    list the keys of all others, empty. Of a message only `content` may be meant to be empty."""
    if not isinstance(row, dict):
        return row
    return {name: _filled(value) for name, value in row.items()}


def _filled(value: Any) -> Any:
    if not isinstance(value, list):
        return without_empty(value) if isinstance(value, dict) else value
    return [
        without_empty(item) | ({"content": None} if item.get("content", "") is None else {})
        if isinstance(item, dict)
        else item
        for item in value
    ]


def hint_for(path: Path) -> str:
    """What reads a file of another kind."""
    kind = path.suffix.lower()
    if kind in (".gz", ".zst", ".bz2", ".xz", ".csv", ".tsv", ".json", ".arrow"):
        return (
            f"; the datasets library reads {kind} files: put it into a folder of its own and "
            "write data: {hub: FOLDER, column: ...}"
        )
    return ""

"""Rows of JSONL and Parquet files, addressed by number, with their place in the file for error messages."""

from __future__ import annotations

import mmap
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import orjson

from miles.core.errors import DataError
from miles.rollout.data.remote import fetch, is_remote

Row = dict[str, Any]

_SLICED = re.compile(r"(?P<path>.*)@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]")
_WHITESPACE = b" \t\r\n"


@dataclass(frozen=True, slots=True)
class DataPath:
    """A file, and the part of its rows to use: ``path@[start:stop]`` selects like a Python slice."""

    path: Path
    rows: slice = field(default_factory=lambda: slice(None))
    address: str | None = None
    """Where the file is, when it is not on this machine (``remote.fetch``)."""


class Rows(Protocol):
    """Rows of one file."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row:
        """The row; ValueError with the reason when it cannot be read."""

    def where(self, index: int) -> str:
        """The row's place: file and line."""


def parse_paths(text: str) -> list[DataPath]:
    """Files of a ``--prompt-data`` value: one path, or several separated by commas, each with an optional slice."""
    return [_parse_path(part.strip()) for part in text.split(",") if part.strip()]


def _parse_path(text: str) -> DataPath:
    match = _SLICED.fullmatch(text)
    place = text if match is None else match["path"]
    bounds = [int(match[name]) if match and match[name] else None for name in ("start", "stop")]
    return DataPath(Path(place), slice(*bounds), place if is_remote(place) else None)


def open_rows(source: DataPath, columns: Collection[str]) -> Rows:
    """Open a ``.jsonl``/``.json`` or ``.parquet`` file.  Only ``columns`` of a Parquet file are read."""
    if source.address is not None:
        source = DataPath(fetch(source.address), source.rows)
    if not source.path.is_file():
        raise DataError(f"{source.path}: no such file")
    match source.path.suffix:
        case ".jsonl" | ".json":
            return JsonlRows(source)
        case ".parquet":
            return ParquetRows(source, columns)
        case suffix:
            raise DataError(f"{source.path}: cannot read {suffix or 'a file without a suffix'}; use .jsonl or .parquet")


class JsonlRows:
    """One JSON object per line.  The file stays on disk; memory holds 24 bytes per row."""

    def __init__(self, source: DataPath) -> None:
        self._path = source.path
        with source.path.open("rb") as file:
            size = file.seek(0, 2)
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        spans, lines = _line_spans(self._bytes)
        self._spans, self._lines = spans[source.rows], lines[source.rows]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Row:
        start, stop = self._spans[index].tolist()
        row = orjson.loads(self._bytes[start:stop])
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object, found {type(row).__name__}")
        return row

    def where(self, index: int) -> str:
        return f"{self._path}:{self._lines[index]}"


def _line_spans(data: mmap.mmap | bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Start and end of every line that is not blank, and its number counted from 1."""
    if not data:
        return np.empty((0, 2), np.int64), np.empty(0, np.int64)
    newlines = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
    starts = np.concatenate(([0], newlines + 1)).astype(np.int64)
    stops = np.concatenate((newlines, [len(data)])).astype(np.int64)
    # A line longer than this holds more than a stray carriage return or spaces.
    filled = (stops - starts) > 2
    for index in np.flatnonzero(~filled):
        filled[index] = bool(data[starts[index] : stops[index]].strip(_WHITESPACE))
    return np.stack((starts, stops), axis=1)[filled], (np.flatnonzero(filled) + 1).astype(np.int64)


class ParquetRows:
    """The needed columns of a Parquet file, columnar in memory."""

    def __init__(self, source: DataPath, columns: Collection[str]) -> None:
        # Parquet data is the rarer case, and importing pyarrow costs every other run a quarter of a second.
        import pyarrow.parquet

        self._path = source.path
        try:
            present = pyarrow.parquet.read_schema(source.path).names
            table = pyarrow.parquet.read_table(source.path, columns=[name for name in present if name in columns])
        except pyarrow.ArrowException as error:
            raise DataError(f"{source.path}: not a readable Parquet file ({error})") from error
        start, stop, _ = source.rows.indices(len(table))
        self._first = start
        self._table = table.slice(start, max(0, stop - start))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Row:
        row: Row = self._table.slice(index, 1).to_pylist()[0]
        return {name: value for name, value in row.items() if value is not None}

    def where(self, index: int) -> str:
        return f"{self._path}: row {self._first + index + 1}"

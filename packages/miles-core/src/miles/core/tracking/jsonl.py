"""``metrics.jsonl``: the record of a run that every other view is made from.

One event per line: ``{"kind": "train", "step": 12, "rollout_id": 3, "time": 1700000000.0, "metrics": {...}}``.
Numbers that JSON cannot write are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from miles.core.errors import CheckpointError
from miles.core.run_directory import RunDirectory

if TYPE_CHECKING:
    from miles.core.config import Config


@dataclass(frozen=True, slots=True)
class Record:
    """One logged event."""

    kind: str
    step: int
    rollout_id: int
    time: float
    """Unix seconds."""
    metrics: dict[str, float]


class JsonlTracker:
    """Appends to ``metrics.jsonl``; a kill at any instant loses at most the line being written."""

    def __init__(self, config: Config | None, run_dir: Path) -> None:
        del config
        self._path = RunDirectory(run_dir).metrics
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        self.truncate(_end_of_last_line(self._path))

    def log(self, metrics: Mapping[str, float], *, step: int, kind: str, rollout_id: int) -> None:
        """Append one line with one write, so that no reader sees half of it."""
        record = {
            "kind": kind,
            "step": step,
            "rollout_id": rollout_id,
            "time": time.time(),
            "metrics": {name: _encode(value) for name, value in metrics.items()},
        }
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        while line:
            line = line[os.write(self._file, line) :]

    def offset(self) -> int:
        """Bytes written so far, and on disk from now on: the place to come back to."""
        os.fsync(self._file)
        return os.lseek(self._file, 0, os.SEEK_END)

    def truncate(self, offset: int) -> None:
        """Forget everything after ``offset``, which ``offset()`` once returned.

        CheckpointError if the file is shorter than that.
        """
        end = self.offset()
        if offset > end:
            raise CheckpointError(
                f"{self._path} has {end} bytes, but {offset} were there when the checkpoint was written. "
                "Put the file back, or start again in another --save directory"
            )
        os.ftruncate(self._file, offset)
        os.lseek(self._file, 0, os.SEEK_END)

    def close(self) -> None:
        """Reach the disk.  Safe to call twice."""
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1


def read_records(path: Path) -> Iterator[Record]:
    """The events of a ``metrics.jsonl``, in order; none when there is no such file.

    A half-written last line is left out.
    """
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield _decode(json.loads(line))


def _decode(event: dict[str, object]) -> Record:
    metrics = event["metrics"]
    assert isinstance(metrics, dict)
    values = {name: float(value) for name, value in metrics.items()}
    return Record(**{**event, "metrics": values})  # type: ignore[arg-type]


def _encode(value: float) -> float | int | str:
    number = value if isinstance(value, int) else float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else ("Infinity" if number > 0 else "-Infinity")


def _end_of_last_line(path: Path) -> int:
    """Bytes up to the last line feed: what follows was torn by a crash."""
    with path.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        end = stream.tell()
        while end:
            start = max(0, end - 65536)
            stream.seek(start)
            newline = stream.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0

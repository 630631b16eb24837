"""Checkpoints that are whole or absent.

A checkpoint is written beside its place, listed file by file with checksums in ``manifest.json``, renamed into place,
and only then named in ``latest_checkpointed_iteration.txt``.  A kill at any instant leaves the previous one in force.

    DIR/latest_checkpointed_iteration.txt     "7"
    DIR/iter_0000007/actor/ rollout/ driver.json manifest.json
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from miles.core.errors import CheckpointError

TRACKER_FILE = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
DRIVER_STATE = "driver.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class DriverState:
    """What the driver itself must remember."""

    rollout_id: int
    """Last rollout that was trained on."""
    metrics_offset: int
    """Bytes of ``metrics.jsonl`` at that moment; what follows belongs to work that is done again."""
    train_steps: int | None = None
    """Optimizer steps taken so far; None in checkpoints that did not count them."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A published checkpoint."""

    path: Path
    state: DriverState

    @property
    def actor(self) -> Path:
        return self.path / "actor"

    @property
    def rollout(self) -> Path:
        return self.path / "rollout"


@contextmanager
def publish(directory: Path, state: DriverState) -> Iterator[Checkpoint]:
    """Yield an unpublished checkpoint to be filled; publish it when the block ends without an error."""
    name = _name(state.rollout_id)
    partial = Checkpoint(directory / f".{name}.partial", state)
    _remove_partial(directory)
    partial.actor.mkdir(parents=True)
    partial.rollout.mkdir()
    try:
        yield partial
        (partial.path / DRIVER_STATE).write_text(json.dumps(asdict(state)))
        _write_manifest(partial.path)
    except BaseException:
        _remove_partial(directory)  # a full disk needs the room
        raise
    final = directory / name
    if final.exists():  # written by an earlier life of the run that went further than the checkpoint it resumed from
        shutil.rmtree(final)
    partial.path.rename(final)
    _sync_directory(directory)
    _replace_text(directory / TRACKER_FILE, str(state.rollout_id))


def latest(directory: Path) -> Checkpoint | None:
    """The published checkpoint, verified byte for byte; None when nothing was ever published.

    Raises CheckpointError naming the broken file and the newest older checkpoint that is whole.
    """
    tracker = directory / TRACKER_FILE
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise CheckpointError(f"{tracker}: expected the number of an iteration, found {text!r}")
    path = directory / _name(int(text))
    problem = verify(path)
    if problem is not None:
        raise CheckpointError(f"checkpoint {path} is unusable: {problem}.{_offer(directory, int(text))}")
    return read(path)


def read(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, which must have been verified."""
    return Checkpoint(path, DriverState(**json.loads((path / DRIVER_STATE).read_text())))


def verify(path: Path) -> str | None:
    """What is wrong with the checkpoint at ``path``; None when every byte is as it was written."""
    try:
        manifest: Any = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{path / MANIFEST} cannot be read ({error})"
    if not isinstance(manifest, dict):
        return f"{path / MANIFEST} is no JSON object"
    if manifest.get("format") != FORMAT:
        return f"its format is {manifest.get('format')!r}, this version reads {FORMAT}"
    for relative, expected in manifest["files"].items():
        file = path / relative
        if not file.is_file():
            return f"{file} is missing"
        size = file.stat().st_size
        if size != expected["bytes"]:
            return f"{file} has {size} bytes, {expected['bytes']} were written"
        if _digest(file) != expected["sha256"]:
            return f"{file} was changed after it was written (checksum)"
    return None


def _remove_partial(directory: Path) -> None:
    """What was not published: of this checkpoint, or of one that a kill interrupted."""
    for path in directory.glob(".iter_*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _offer(directory: Path, broken: int) -> str:
    older = sorted(int(match[1]) for path in directory.iterdir() if (match := re.fullmatch(r"iter_(\d{7})", path.name)))
    for rollout_id in reversed(older):
        if rollout_id < broken and verify(directory / _name(rollout_id)) is None:
            return (
                f" {_name(rollout_id)} is whole: to go back to it, write {rollout_id} into {directory / TRACKER_FILE}"
            )
    return " No older checkpoint there is whole: remove the directory to start again"


def _name(rollout_id: int) -> str:
    return f"iter_{rollout_id:07d}"


def _write_manifest(path: Path) -> None:
    files = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            files[str(file.relative_to(path))] = {"bytes": file.stat().st_size, "sha256": _digest(file)}
            _sync_file(file)
    manifest = path / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
    _sync_file(manifest)
    _sync_directory(path)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    _sync_file(partial)
    partial.replace(path)
    _sync_directory(path.parent)


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Checkpoints that are whole or absent.

A checkpoint is written beside its place, listed file by file with checksums in ``manifest.json``, renamed into place,
and only then named in ``latest_checkpointed_iteration.txt``.  A kill at any instant leaves the previous one in force.

    DIR/latest_checkpointed_iteration.txt     "7", and a line feed: without it "7" may be what is left of "71"
    DIR/iter_0000007/actor/ rollout/ driver.json manifest.json
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from miles.core.durable import replace_text, sync, sync_tree
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
def publish(directory: Path, state: DriverState, *, keep: int | None = None) -> Iterator[Checkpoint]:
    """Yield an unpublished checkpoint to be filled; publish it when the block ends without an error.

    Of the older checkpoints so many stay that there are ``keep`` in all; None: all stay.
    """
    partial = begin(directory, state)
    try:
        yield partial
        complete(partial, keep=keep)
    except BaseException:
        remove_partial(directory)  # a full disk needs the room
        raise


def begin(directory: Path, state: DriverState) -> Checkpoint:
    """An unpublished checkpoint to be filled, then to be given to ``complete``.

    No other has its name: a rank of a driver that was killed may write for a moment longer, and must not write here.
    """
    partial = Checkpoint(directory / f".{_name(state.rollout_id)}.{secrets.token_hex(4)}.partial", state)
    remove_partial(directory)
    partial.actor.mkdir(parents=True)
    partial.rollout.mkdir()
    return partial


def complete(partial: Checkpoint, *, keep: int | None = None) -> None:
    """Publish what ``begin`` began; see ``publish``."""
    directory, name = partial.path.parent, _name(partial.state.rollout_id)
    (partial.path / DRIVER_STATE).write_text(json.dumps(asdict(partial.state)))
    _write_manifest(partial.path)
    final = directory / name
    if final.exists():  # written by an earlier life of the run that went further than the checkpoint it resumed from
        _remove(final)
    partial.path.rename(final)
    sync(directory)
    replace_text(directory / TRACKER_FILE, f"{partial.state.rollout_id}\n")
    if keep is not None:
        older = [rollout_id for rollout_id in _published(directory) if rollout_id < partial.state.rollout_id]
        for rollout_id in older[: max(0, len(older) + 1 - keep)]:
            _remove(directory / _name(rollout_id))


def latest(directory: Path, *, skip_broken: bool = False) -> Checkpoint | None:
    """The published checkpoint, verified byte for byte; None when nothing was ever published.

    Raises CheckpointError naming the broken file and the newest older checkpoint that is whole; with ``skip_broken``
    that one is taken instead, and the log says so.
    """
    tracker = directory / TRACKER_FILE
    if not tracker.is_file():
        return None
    text = tracker.read_text(errors="replace")
    newest = _named(text, _published(directory))
    problem = f"{tracker}: expected the number of an iteration and a line feed, found {text!r}"
    if newest is not None:
        path = directory / _name(newest)
        problem = verify(path) or ""
        if not problem:
            return read(path)
        problem = f"checkpoint {path} is unusable: {problem}"
    whole = _newest_whole(directory, before=newest)
    if whole is None:
        raise CheckpointError(f"{problem}. No older checkpoint there is whole: remove the directory to start again")
    if not skip_broken:
        raise CheckpointError(
            f"{problem}. {_name(whole)} is whole: to go back to it, give --skip-broken-checkpoints or write {whole} "
            f"into {tracker}"
        )
    logging.getLogger(__name__).warning("%s. Going on from %s", problem, _name(whole))
    return read(directory / _name(whole))


def actor_state(directory: Path, rollout_id: int | None) -> Path:
    """The actor's state in the run directory ``directory``: of the checkpoint after ``rollout_id``, or of the newest.

    Raises CheckpointError where it is not whole.
    """
    if rollout_id is None:
        newest = latest(directory)
        if newest is None:
            raise CheckpointError(f"{directory} holds no checkpoint: there is no {TRACKER_FILE}")
        return newest.actor
    path = directory / _name(rollout_id)
    if problem := verify(path):
        raise CheckpointError(f"checkpoint {path} is unusable: {problem}")
    return read(path).actor


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


def remove_partial(directory: Path) -> None:
    """What was not published: of this checkpoint, or of one that a kill interrupted."""
    for path in directory.glob(".iter_*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Take a checkpoint away; a kill leaves it whole, or something that is not taken for one."""
    doomed = path.with_name(f".{path.name}.removed.partial")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _named(text: str, published: Iterable[int]) -> int | None:
    """The iteration that the tracker's ``text`` names; None: none, or it may have been cut from a longer number."""
    number = text.strip()
    if not number.isdecimal():
        return None
    longer = any(len(other) > len(number) and other.startswith(number) for other in map(str, published))
    return int(number) if text.endswith("\n") or not longer else None


def _published(directory: Path) -> list[int]:
    """Iterations, ascending."""
    matches = (re.fullmatch(r"iter_(\d{7})", path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _newest_whole(directory: Path, before: int | None) -> int | None:
    """The newest checkpoint without a fault, older than ``before``."""
    for rollout_id in reversed(_published(directory)):
        if (before is None or rollout_id < before) and verify(directory / _name(rollout_id)) is None:
            return rollout_id
    return None


def _name(rollout_id: int) -> str:
    return f"iter_{rollout_id:07d}"


def _write_manifest(path: Path) -> None:
    files = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            files[str(file.relative_to(path))] = {"bytes": file.stat().st_size, "sha256": _digest(file)}
    (path / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
    sync_tree(path)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""Directories that are replaced as a whole: a reader finds the old one or the new one, never half of one.

A directory is moved aside before another takes its place.  After a kill between the two it is put back before a new one
is begun.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from miles.core.durable import sync, sync_tree


@contextmanager
def replaced(directory: Path) -> Iterator[Path]:
    """Yield an empty directory beside ``directory``, which takes its place when the block ends without an error."""
    fresh, old = (directory.with_name(f".{directory.name}.{state}") for state in ("partial", "old"))
    if old.exists() and not directory.exists():
        old.rename(directory)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        sync_tree(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)  # a full disk needs the room
        raise
    if directory.exists():
        directory.rename(old)
    fresh.rename(directory)
    sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)

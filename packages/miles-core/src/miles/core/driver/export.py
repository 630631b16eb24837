"""Directories that are replaced as a whole: a reader finds the old one or the new one, never half of one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(directory: Path) -> Iterator[Path]:
    """Yield an empty directory beside ``directory``, which takes its place when the block ends without an error."""
    fresh, old = (directory.with_name(f".{directory.name}.{state}") for state in ("partial", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)  # a full disk needs the room
        raise
    if directory.exists():
        directory.rename(old)
    fresh.rename(directory)
    shutil.rmtree(old, ignore_errors=True)

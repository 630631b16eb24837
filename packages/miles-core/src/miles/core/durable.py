"""Files that survive a loss of power: on disk before anything names them."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Have ``text`` in the place of the file at ``path``: after a crash there is the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def sync_tree(directory: Path) -> None:
    """Return when everything in ``directory`` is on disk, names included."""
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)


def sync(path: Path) -> None:
    """Return when the file at ``path``, or the names in the directory there, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

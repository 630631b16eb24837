"""Directories for the files that SGLang's servers leave behind: /dev/shm and /tmp would fill, run after run."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "miles-sglang-"


def make_directory() -> Path:
    """A new one for one server.  The name carries the owner's pid: those of owners that were killed are removed."""
    for path in SHARED_MEMORY.glob(f"{_PREFIX}*-*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=SHARED_MEMORY))

"""One run at a time in a run directory."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from miles.core.errors import ConfigError

LOCK_FILE = "lock"


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold ``run_dir`` for the length of the block; ConfigError that names the holder when another process has it.

    The kernel gives the lock back when this process ends, however it ends.  It is a POSIX record lock: children do not
    inherit it, and network file systems carry it to other machines.
    """
    path = run_dir / LOCK_FILE
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX leaves the choice between EAGAIN and EACCES
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(
                f"--save {run_dir}: this run is being made by {holder}. Wait for it, stop it, or name another directory"
            ) from None
        except OSError as error:  # a file system without locks
            sys.stderr.write(f"--save {run_dir} cannot be locked ({error}): see to it that one run at a time uses it\n")
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield

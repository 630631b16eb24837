# mypy: disable-error-code="import-not-found"
"""A directory for the files that a server makes and never removes: whoever started it removes the directory.

They are the sockets at which its processes meet, and the memory in which it publishes its load.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from sglang.srt.managers import load_snapshot
from sglang.srt.server_args import PortArgs

VARIABLE = "MILES_SERVER_FILES"
"""Names the directory."""


def install(directory: str) -> None:
    """Have the files made there and not in /tmp and /dev/shm.  To be called in every process of the server."""
    load_snapshot.shm_path_for = lambda _server: str(Path(directory) / "load")
    PortArgs.init_new = staticmethod(_within(directory, PortArgs.init_new))


def _within(directory: str, name_sockets: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(name_sockets)
    def init_new(*args: Any, **named: Any) -> Any:
        usual, tempfile.tempdir = tempfile.tempdir, directory
        try:
            return name_sockets(*args, **named)
        finally:
            tempfile.tempdir = usual

    return init_new

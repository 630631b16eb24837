"""What this machine has, found without importing torch."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from miles.core import environ

_NVIDIA_DEVICE = re.compile(r"nvidia\d+")


def num_accelerators() -> int:
    """NVIDIA GPUs that this process may use; 0 as well when the installed torch is a CPU build."""
    if torch_is_cpu_build():
        return 0
    present = sum(1 for entry in Path("/dev").iterdir() if _NVIDIA_DEVICE.fullmatch(entry.name))
    visible = environ.visible_devices()
    return present if visible is None else min(present, len(visible))


@cache
def torch_is_cpu_build() -> bool:
    """Whether the installed torch cannot use a GPU."""
    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def is_installed(module: str) -> bool:
    """Whether ``module`` could be imported; only the packages around it are."""
    return find_spec(module) is not None

"""The environment variables that Miles reads and sets: all of them, and the only place that does."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

# Variable, number of the option (malloc.h) and bytes: what is allocated on its own, what is kept when freed.
_MALLOC_OPTIONS = (("MALLOC_MMAP_THRESHOLD_", -3, 2**25), ("MALLOC_TRIM_THRESHOLD_", -1, 2**26))


def plugins_disabled() -> bool:
    """``MILES_DISABLE_PLUGINS=1``: run with Miles' own packages only."""
    return os.environ.get("MILES_DISABLE_PLUGINS", "0") not in ("", "0")


def visible_devices() -> list[str] | None:
    """``CUDA_VISIBLE_DEVICES``: the accelerators this process may use; None when it may use all."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if value is None else [device for device in value.split(",") if device.strip() not in ("", "-1")]


def set_visible_devices(devices: Sequence[str]) -> None:
    """``CUDA_VISIBLE_DEVICES`` for this process, before it looks for accelerators, and for its children."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)


def tensorboard_dir() -> str | None:
    """``TENSORBOARD_DIR``: where TensorBoard logs go without ``--tensorboard-dir``."""
    return os.environ.get("TENSORBOARD_DIR") or None


def cache_dir() -> Path:
    """``XDG_CACHE_HOME``/miles, by default ``~/.cache/miles``: what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "miles"


def sglang_python() -> str | None:
    """``MILES_SGLANG_PYTHON``: the interpreter that has SGLang, without ``--sglang-python``."""
    return os.environ.get("MILES_SGLANG_PYTHON") or None


def make_cublas_deterministic() -> None:
    """``CUBLAS_WORKSPACE_CONFIG``: without it PyTorch's deterministic mode refuses products on an accelerator.

    Takes effect before the first of them.  Whoever sets it has the last word.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def prepare_process() -> None:
    """Set what this process and its children need before torch is loaded.

    Passive waiting: by default OpenMP's threads spin while they wait.  As soon as a trainer and an engine share cores,
    that makes a step tens of times slower.

    Memory that is kept: by default the C library gives freed buffers back at once, and the kernel clears their pages
    again for the next layer.  These are the limits that glibc itself goes to once a program has freed a large buffer.
    It reads them as a process begins, so that this one is told by a call.

    Whoever sets one of these variables has the last word.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name, option, value in _MALLOC_OPTIONS:
        if name not in os.environ:
            os.environ[name] = str(value)
            _mallopt(option, value)


def _mallopt(option: int, value: int) -> None:
    """Set an option of glibc's allocator; other C libraries have none."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)

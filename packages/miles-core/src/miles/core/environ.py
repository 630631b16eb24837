"""The environment variables that Miles reads and sets: all of them, and the only place that does."""

from __future__ import annotations

import os
from pathlib import Path


def plugins_disabled() -> bool:
    """``MILES_DISABLE_PLUGINS=1``: run with Miles' own packages only."""
    return os.environ.get("MILES_DISABLE_PLUGINS", "0") not in ("", "0")


def visible_devices() -> list[str] | None:
    """``CUDA_VISIBLE_DEVICES``: the accelerators this process may use; None when it may use all."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if value is None else [device for device in value.split(",") if device.strip() not in ("", "-1")]


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
    """Set what this process and its children need before torch is loaded: passive waiting.

    By default OpenMP's threads spin while they wait.  As soon as a trainer and an engine share cores, that makes a step
    tens of times slower.  Whoever sets ``OMP_WAIT_POLICY`` has the last word.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

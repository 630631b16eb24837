"""The environment variables that Miles reads: all of them, and the only place that does."""

from __future__ import annotations

import os


def plugins_disabled() -> bool:
    """``MILES_DISABLE_PLUGINS=1``: run with Miles' own packages only."""
    return os.environ.get("MILES_DISABLE_PLUGINS", "0") not in ("", "0")


def visible_devices() -> list[str] | None:
    """``CUDA_VISIBLE_DEVICES``: the accelerators this process may use; None when it may use all."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if value is None else [device for device in value.split(",") if device.strip() not in ("", "-1")]


def host_ip() -> str | None:
    """``MILES_HOST_IP``: address under which other machines reach this one."""
    return os.environ.get("MILES_HOST_IP") or None


def tensorboard_dir() -> str | None:
    """``TENSORBOARD_DIR``: where TensorBoard logs go without ``--tensorboard-dir``."""
    return os.environ.get("TENSORBOARD_DIR") or None

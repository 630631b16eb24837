"""How much memory the machine has left."""

from __future__ import annotations

from pathlib import Path

_UNKNOWN = 4 << 30
"""Assumed where the system does not tell."""


def available_memory() -> int:
    """Bytes that can be taken without swapping."""
    table = Path("/proc/meminfo")
    if table.exists():
        for line in table.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return _UNKNOWN

"""A tracker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miles.core.config import Config


class CsvTracker:
    """Writes one line per value to ``metrics.csv`` in the run directory."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._file = (run_dir / "metrics.csv").open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, float], *, step: int, kind: str, rollout_id: int) -> None:
        for name, value in metrics.items():
            self._file.write(f"{kind},{step},{rollout_id},{name},{value}\n")

    def close(self) -> None:
        self._file.close()

"""An engine in a process of its own."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from miles.core.process import ChildProcess


@dataclass(frozen=True, slots=True)
class LaunchedEngine:
    """A started engine.  Implements EngineProcess, which says what its methods do."""

    url: str
    process: ChildProcess
    drain_s: float = 10.0
    """Most seconds that it gets to finish by itself when it is stopped."""
    files: Path | None = None
    """A directory of its own, which is removed when it has been stopped."""

    def wait_ready(self, deadline_s: float) -> None:
        """See EngineProcess."""
        self.process.wait_ready(f"{self.url}/health_generate", deadline_s)

    def alive(self) -> bool:
        """See EngineProcess."""
        return self.process.alive()

    def describe_end(self) -> str:
        """See EngineProcess."""
        return self.process.describe_end()

    def stop(self, deadline_s: float = 10.0) -> None:
        """See EngineProcess."""
        self.process.stop(min(deadline_s, self.drain_s))
        if self.files is not None:
            shutil.rmtree(self.files, ignore_errors=True)

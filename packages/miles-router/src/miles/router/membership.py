"""Which workers there are: added and removed by requests, by the command line, and by a file."""

from __future__ import annotations

import asyncio
from pathlib import Path

from miles.core.errors import ConfigError
from miles.router.dispatcher import Dispatcher
from miles.router.health import HealthMonitor
from miles.router.workers import Fleet, Worker, parse_worker


class Membership:
    """Keeps fleet and health checks in step."""

    def __init__(self, fleet: Fleet, dispatcher: Dispatcher, monitor: HealthMonitor) -> None:
        self.fleet = fleet
        self._dispatcher = dispatcher
        self._monitor = monitor
        self._from_file: set[str] = set()
        self._removals: set[asyncio.Task[int]] = set()

    def add(self, url: str, weight: float | None = None) -> Worker:
        """Register a worker and begin to check it; a known one is checked at once.  Raises ConfigError."""
        worker = self.fleet.add(url, weight)
        self._monitor.watch(worker)
        return worker

    def remove(self, worker: Worker, timeout_s: float) -> asyncio.Task[int]:
        """Drain ``worker`` and forget it, whether or not anybody waits for the task."""
        task = asyncio.get_running_loop().create_task(self._remove(worker, timeout_s))
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)
        return task

    def read_file(self, path: Path, drain_timeout_s: float) -> None:
        """Make the workers that came from ``path`` those it names now.  Changes nothing when it raises ConfigError."""
        wanted = dict(read_workers_file(path))
        added = {self.add(url, weight).url for url, weight in wanted.items()}
        for url in self._from_file - added:
            worker = self.fleet.get(url)
            if worker is not None:
                self.remove(worker, drain_timeout_s)
        self._from_file = added

    def stop(self) -> None:
        """Give up removals that are under way."""
        for task in self._removals:
            task.cancel()

    async def _remove(self, worker: Worker, timeout_s: float) -> int:
        late = await self._dispatcher.remove(worker, timeout_s)
        if self.fleet.get(worker.url) is not worker:
            self._monitor.forget(worker)
        return late


def read_workers_file(path: Path) -> list[tuple[str, float]]:
    """URL and weight of each line; blank lines and lines that begin with ``#`` do not count."""
    lines = read_text(path, "--workers-file").splitlines()
    problems, workers = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                workers.append(parse_worker(line))
            except ConfigError as error:
                problems.append(f"--workers-file {path}, line {number}: {error}")
    if problems:
        raise ConfigError(*problems)
    return workers


def read_text(path: Path, flag: str) -> str:
    """What the file given by ``flag`` says; raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag} {path}: expected UTF-8 text ({error})") from error

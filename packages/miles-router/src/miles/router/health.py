"""Health checks: one task per worker asks it regularly how it is."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable

from miles.router.fetch import FetchError, fetch
from miles.router.settings import Settings
from miles.router.workers import Fleet, Worker, WorkerState

_DOUBTFUL_INTERVAL_S = 0.5  # between checks of a suspect or probing worker
_QUARANTINE_INTERVAL_S = 2.0


class HealthMonitor:
    """Owns the checks of every worker of ``fleet``.  ``on_failure`` is told when a check breaks by our own fault."""

    def __init__(self, fleet: Fleet, settings: Settings, on_failure: Callable[[BaseException], None]) -> None:
        self._fleet = fleet
        self._settings = settings
        self._on_failure = on_failure
        self._tasks: dict[Worker, asyncio.Task[None]] = {}

    def watch(self, worker: Worker) -> None:
        """Begin to check ``worker``, if it is not being checked."""
        if worker not in self._tasks:
            task = asyncio.get_running_loop().create_task(self._check_forever(worker))
            self._tasks[worker] = task
            task.add_done_callback(self._report)

    def forget(self, worker: Worker) -> None:
        """End the checks of ``worker``."""
        task = self._tasks.pop(worker, None)
        if task is not None:
            task.cancel()

    async def stop(self) -> None:
        """End all checks."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _check_forever(self, worker: Worker) -> None:
        while True:
            worker.wake.clear()
            await self._check(worker)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s(worker)):  # wait_for may swallow that the check is ended
                    await worker.wake.wait()

    async def _check(self, worker: Worker) -> None:
        timeout_s = self._settings.health_check_timeout_s
        try:
            answer = await fetch(worker, "GET", self._settings.health_check_path, timeout_s=timeout_s)
            if answer.status != 200:
                self._fleet.probe_failed(worker, f"health check answered {answer.status}")
                return
            version = await self._weight_version(worker)
        except FetchError as error:
            self._fleet.probe_failed(worker, f"health check: {error}")
        else:
            self._fleet.probe_passed(worker, version)

    async def _weight_version(self, worker: Worker) -> str | None:
        """Version of the weights the worker holds; None when it does not keep one."""
        answer = await fetch(worker, "GET", "/model_info", timeout_s=self._settings.health_check_timeout_s)
        if answer.status != 200:
            return None
        try:
            info = json.loads(answer.body)
        except (ValueError, RecursionError):
            return None
        version = info.get("weight_version") if isinstance(info, dict) else None
        return None if version is None else str(version)

    def _interval_s(self, worker: Worker) -> float:
        normal = self._settings.health_check_interval_s
        if worker.state is WorkerState.HEALTHY:
            return normal
        doubtful = worker.state in (WorkerState.SUSPECT, WorkerState.PROBING)
        return min(normal, _DOUBTFUL_INTERVAL_S if doubtful else _QUARANTINE_INTERVAL_S)

    def _report(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)

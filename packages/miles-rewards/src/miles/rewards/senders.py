"""Requests to a reward service from several processes, for rollouts whose requests would keep one event loop busy.

A child (``python -m miles.rewards.sender``) reads lines ``number body`` from its standard input and writes lines
``number outcome``; it ends when its input does, so none outlives its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from miles.core.protocols.reward import RewardOutcome
from miles.rewards.verdict import failed

if TYPE_CHECKING:
    from miles.rewards.context import Settings

DEFAULT_SENDERS = 2
MAX_LINE_BYTES = 256 << 20
"""Of a request or an outcome."""
_STOP_S = 5.0


class Senders:
    """The children.  Started when first used; one that dies fails what it had in hand and is started again."""

    def __init__(self, settings: Settings) -> None:
        count = settings.num_senders
        arguments = {
            "url": settings.url,
            "timeout_s": settings.timeout_s,
            "concurrency": -(-settings.concurrency // count),
            "http_proxy": settings.http_proxy,
        }
        self._senders = [_Sender(json.dumps(arguments)) for _ in range(count)]

    async def ask(self, body: bytes) -> RewardOutcome:
        """What the service answers to a JSON ``body`` without line breaks; a failure is an outcome too."""
        return await min(self._senders, key=lambda sender: len(sender.waiting)).ask(body)

    async def close(self) -> None:
        """End the children."""
        await asyncio.gather(*(sender.close() for sender in self._senders))


@dataclass(slots=True, eq=False)
class _Child:
    process: asyncio.subprocess.Process
    stdin: asyncio.StreamWriter
    reading: asyncio.Task[None]


class _Sender:
    """One child, and who waits for it."""

    def __init__(self, arguments: str) -> None:
        self.waiting: dict[int, asyncio.Future[RewardOutcome]] = {}
        self._arguments = arguments
        self._numbers = itertools.count()
        self._starting = asyncio.Lock()
        self._child: _Child | None = None

    async def ask(self, body: bytes) -> RewardOutcome:
        number = next(self._numbers)
        future: asyncio.Future[RewardOutcome] = asyncio.get_running_loop().create_future()
        self.waiting[number] = future
        try:
            child = await self._started()
            child.stdin.write(b"%d %b\n" % (number, body))
            await child.stdin.drain()
            return await future
        except (OSError, RuntimeError) as error:
            return failed("remote_error", f"the process that sends requests is gone ({error})", 0.0)
        finally:
            self.waiting.pop(number, None)

    async def close(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.stdin.close()
        try:
            await asyncio.wait_for(child.process.wait(), _STOP_S)
        except TimeoutError:
            child.process.kill()
            await child.process.wait()
        await child.reading

    async def _started(self) -> _Child:
        async with self._starting:
            if self._child is None:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "miles.rewards.sender", self._arguments),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    limit=MAX_LINE_BYTES,
                    start_new_session=True,  # Ctrl-C at the terminal is for the parent, which ends its children
                )
                assert process.stdin is not None
                assert process.stdout is not None
                reading = asyncio.create_task(self._read(process, process.stdout))
                self._child = _Child(process, process.stdin, reading)
            return self._child

    async def _read(self, process: asyncio.subprocess.Process, stdout: asyncio.StreamReader) -> None:
        try:
            while line := await stdout.readline():
                number, _, outcome = line.partition(b" ")
                future = self.waiting.get(int(number))
                if future is not None and not future.done():
                    future.set_result(RewardOutcome(**json.loads(outcome)))
        except (ValueError, TypeError):  # no outcome, or one longer than any
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        status = await process.wait()
        if self._child is not None and self._child.process is process:
            self._child = None
        for future in self.waiting.values():
            if not future.done():
                detail = f"the process that sends requests ended with status {status}"
                future.set_result(failed("remote_error", detail, 0.0))


def outcome_fields(outcome: RewardOutcome) -> dict[str, Any]:
    """The fields of an outcome that a service can cause."""
    return {name: getattr(outcome, name) for name in ("score", "category", "detail", "seconds", "failed")}

"""One reward service over HTTP: connections that are reused, and patience.

The rules are those of ``miles.rewards.types.remote``.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from typing import TYPE_CHECKING, Any

from miles.rewards.verdict import failed, outcome_of

if TYPE_CHECKING:
    import aiohttp

    from miles.core.protocols.reward import RewardOutcome

TOTAL_S = 120.0
_TRY_S = 30.0
_LEAST_TRY_S = 0.05
_LEAST_WAIT_S = 0.05
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 15.0
_PASSING = frozenset({408, 425, 429, *range(500, 600)})
_DETAIL_CHARS = 200


class _Passing(Exception):
    """A failure that may pass; ``wait_s`` is how long the service asked to wait."""

    def __init__(self, detail: str, wait_s: float | None = None) -> None:
        super().__init__(detail)
        self.wait_s = wait_s


class _Final(Exception):
    """A failure that will not pass."""


class Client:
    """Asks the service.  Serves one event loop."""

    def __init__(self, url: str, *, timeout_s: float | None, concurrency: int, http_proxy: str | None) -> None:
        """``timeout_s``: when to give up, all tries included; None: after 120 s."""
        self._url = url
        self._total_s = timeout_s or TOTAL_S
        self._concurrency = concurrency
        self._http_proxy = http_proxy
        self._slots = asyncio.Semaphore(concurrency)
        self._jitter = random.Random()  # of its own in every process, lest all come back together
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, body: bytes) -> RewardOutcome:
        """What the service answers to a JSON ``body``; a failure is an outcome too."""
        async with self._slots:
            started = time.perf_counter()
            try:
                reward = await self._persist(body, started)
            except (_Passing, _Final) as error:
                return failed("remote_error", str(error), 0.0, time.perf_counter() - started)
            return outcome_of(reward, time.perf_counter() - started, 0.0)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _persist(self, body: bytes, started: float) -> Any:
        for attempt in itertools.count():
            left_s = self._total_s - (time.perf_counter() - started)
            try:  # a loop that is late must not ask with no time left: aiohttp takes that for no limit
                return await self._ask(body, max(_LEAST_TRY_S, min(_TRY_S, left_s)))
            except _Passing as error:
                wait_s = self._wait(attempt, error.wait_s)
                if time.perf_counter() - started + wait_s >= self._total_s:
                    raise _Final(f"{error} (attempt {attempt + 1}; gave up after {self._total_s:g} s)") from error
                await asyncio.sleep(wait_s)
        raise AssertionError("unreachable")

    def _wait(self, attempt: int, asked_s: float | None) -> float:
        """Seconds before the next attempt: what the service asked for and a little, or longer from time to time."""
        if asked_s is not None:
            return asked_s + self._jitter.uniform(_LEAST_WAIT_S, _FIRST_WAIT_S)
        return self._jitter.uniform(_LEAST_WAIT_S, min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(attempt, 10)))

    async def _ask(self, body: bytes, timeout_s: float) -> Any:
        import aiohttp  # only runs that ask a service need it

        url = self._url
        try:
            async with self._open_session().post(
                url,
                data=body,
                headers={"Content-Type": "application/json"},
                proxy=self._http_proxy,
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as response:
                return _read(response, await response.read(), url)
        except TimeoutError as error:
            raise _Passing(f"{url} did not answer within {timeout_s:.1f} s") from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise _Passing(f"{url}: {type(error).__name__}: {error}") from error
        except aiohttp.ClientError as error:
            raise _Final(f"{url}: {type(error).__name__}: {error}") from error

    def _open_session(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self._concurrency)
            self._session = aiohttp.ClientSession(connector=connector)
        return self._session


def _read(response: aiohttp.ClientResponse, content: bytes, url: str) -> Any:
    text = content[:_DETAIL_CHARS].decode("utf-8", "replace")
    if response.status in _PASSING:
        raise _Passing(f"{url} answered {response.status}: {text}", _retry_after(response))
    if response.status != 200:
        raise _Final(f"{url} answered {response.status}: {text}")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _Final(f"{url} answered with something that is not JSON: {text}") from error


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    """Seconds of the header; a date there is not worth reading."""
    try:
        return max(0.0, float(response.headers.get("Retry-After", "")))
    except ValueError:
        return None

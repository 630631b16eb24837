"""The rollout side's HTTP client: one pool of connections to the router, retries only where they can help."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import aiohttp
import orjson
from yarl import URL

from miles.core.errors import EngineError
from miles.rollout.turns import Turns

Answer = Any
"""Parsed JSON."""

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0
_DONE = (200, 204)
_HEADERS = {"Content-Type": "application/json"}


class RequestError(EngineError):
    """The server refused the request: trying again cannot help."""


class JsonClient:
    """JSON over HTTP to one base URL.  Belongs to the event loop it is first used on.

    Broken connections and 5xx answers are tried again with growing pauses, at most ``attempts`` times and never past
    ``deadline_s`` seconds in all; any other answer than 200 or 204 raises RequestError at once.
    """

    def __init__(self, base_url: str, *, deadline_s: float, attempts: int = 30) -> None:
        self.base_url = base_url.rstrip("/")
        self.num_retries = 0
        """Requests that were tried again, over the client's life."""
        self._deadline_s, self._attempts = deadline_s, attempts
        self._turns = Turns()
        self._urls: dict[str, URL] = {}
        self._session: aiohttp.ClientSession | None = None

    async def post(self, path: str, payload: Any, headers: dict[str, str] | None = None) -> Answer:
        """The answer's JSON; EngineError when there is none in time."""
        content = await self.fetch("POST", path, orjson.dumps(payload), headers)
        await self._turns.take()
        return _parse(path, content)

    async def fetch(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> bytes:
        """The answer's bytes; EngineError when there is none in time."""
        deadline = time.monotonic() + self._deadline_s
        backoff_s = FIRST_BACKOFF_S
        for attempt in range(1, self._attempts + 1):
            try:
                return await self._fetch_once(method, path, body, headers, deadline - time.monotonic())
            except (aiohttp.ClientError, TimeoutError, _ServerError) as error:
                if attempt == self._attempts or time.monotonic() + backoff_s >= deadline:
                    raise EngineError(
                        f"{self.base_url}{path}: no answer after {attempt} attempts ({type(error).__name__}: {error})"
                    ) from error
            self.num_retries += 1
            # Spread the retries of requests that failed together; the pause never reaches a result.
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
        raise AssertionError("the loop returns or raises")

    async def close(self) -> None:
        """Close the pool.  Safe to call twice."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _fetch_once(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str] | None, timeout_s: float
    ) -> bytes:
        url = self._urls.get(path)
        if url is None:
            url = self._urls[path] = URL(self.base_url + path)
        timeout = aiohttp.ClientTimeout(total=max(timeout_s, 0.001))
        async with self._open().request(method, url, data=body, headers=headers, timeout=timeout) as response:
            content = await response.read()
            if response.status in _DONE:
                return content
            text = content[:500].decode(errors="replace")
            if response.status >= 500:
                raise _ServerError(f"status {response.status}: {text}")
            raise RequestError(f"{url} answered {response.status}: {text}")

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), headers=_HEADERS, cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._session


class _ServerError(Exception):
    """A 5xx answer."""


def _parse(path: str, content: bytes) -> Answer:
    try:
        return orjson.loads(content) if content else None
    except orjson.JSONDecodeError as error:
        raise RequestError(f"{path} answered 200 with something that is not JSON: {content[:200]!r}") from error

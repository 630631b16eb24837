"""The weight half of SGLang's HTTP protocol, spoken by the trainer.

Plain ``http.client``: a few requests per update, from a process that has no event loop.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from miles.core.errors import EngineError

Answer = dict[str, Any]

_TIDY_DEADLINE_S = 5.0


class EngineClient:
    """One engine's control plane.  Not thread-safe; every call opens and closes its connection."""

    def __init__(self, url: str, *, deadline_s: float = 600.0) -> None:
        self.url = url
        self._netloc = urlsplit(url).netloc
        self._deadline_s = deadline_s

    def get(self, path: str) -> Answer:
        """JSON answer of a GET; EngineError on anything but 200."""
        return self._request("GET", path, None)

    def post(self, path: str, payload: Answer | None = None, *, deadline_s: float | None = None) -> Answer:
        """JSON answer of a POST; EngineError on anything but 200, or on ``{"success": false}``."""
        return self._request("POST", path, payload or {}, deadline_s)

    def _request(self, method: str, path: str, payload: Answer | None, deadline_s: float | None = None) -> Answer:
        connection = http.client.HTTPConnection(self._netloc, timeout=deadline_s or self._deadline_s)
        body = None if payload is None else json.dumps(payload).encode()
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(
                f"engine {self.url}: {method} {path} got no answer ({type(error).__name__}: {error})"
            ) from error
        finally:
            connection.close()
        if response.status != 200:
            raise EngineError(
                f"engine {self.url}: {method} {path} answered {response.status}: {text[:500].decode(errors='replace')}"
            )
        answer = _parse(text)
        if answer.get("success") is False:
            raise EngineError(f"engine {self.url}: {method} {path} failed: {answer.get('message') or answer}")
        return answer


def _parse(text: bytes) -> Answer:
    """The answer's JSON object; SGLang answers some control calls with plain text, which carries nothing we need."""
    try:
        answer = json.loads(text) if text else {}
    except json.JSONDecodeError:
        return {}
    return answer if isinstance(answer, dict) else {}


def held_checksums(answer: Answer) -> dict[str, str]:
    """What an answer to an update tells of the tensors that are held then; SGLang's has room for it in its message."""
    if "checksums" in answer:
        return dict(answer["checksums"])
    try:
        told, _ = json.JSONDecoder().raw_decode(answer.get("message") or "")
    except json.JSONDecodeError:
        return {}
    return dict(told["checksums"]) if isinstance(told, dict) and "checksums" in told else {}


class EngineFleet:
    """All engines that hold the policy.  A call goes to every engine at the same time and fails if one fails."""

    def __init__(self, urls: Sequence[str], *, deadline_s: float = 600.0) -> None:
        if not urls:
            raise ValueError("a fleet needs at least one engine")
        self._clients = [EngineClient(url, deadline_s=deadline_s) for url in urls]
        # A stream through shared memory goes on only while all engines read.
        self._pool = ThreadPoolExecutor(max_workers=len(urls), thread_name_prefix="miles-weights")

    @property
    def urls(self) -> list[str]:
        return [client.url for client in self._clients]

    def post(self, path: str, payload: Answer | None = None) -> list[Answer]:
        """The answers, in the order of the engines."""
        if len(self._clients) == 1:
            return [self._clients[0].post(path, payload)]
        return list(self._pool.map(lambda client: client.post(path, payload), self._clients))

    def post_anyway(self, path: str, payload: Answer | None = None) -> None:
        """Tell every engine that still listens; for putting things in order after a failure."""
        for client in self._clients:
            with suppress(EngineError):
                client.post(path, payload, deadline_s=_TIDY_DEADLINE_S)

    def post_each(self, path: str, payloads: Sequence[Answer]) -> list[Future[Answer]]:
        """One payload for each engine; returns at once with the answers to come."""
        pairs = zip(self._clients, payloads, strict=True)
        return [self._pool.submit(client.post, path, payload) for client, payload in pairs]

    def get(self, path: str) -> list[Answer]:
        """The answers, in the order of the engines."""
        return list(self._pool.map(lambda client: client.get(path), self._clients))

    def close(self) -> None:
        """Wait for no answer any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

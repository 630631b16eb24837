# mypy: disable-error-code="import-not-found"
"""Prefill and decode servers, paired by the decode server.

A request comes to a decode server as to any other.  It gives the request a room, sends it to a prefill server as well,
and the keys and values of the prompt come from there.  So whoever sends requests need not know of prefill servers, and
a request that is sent again to another decode server gets another room.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Container, Iterable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any
from urllib.parse import urlsplit

import aiohttp

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

SERVERS_PATH = "/prefill_servers"
_PAIRED = frozenset({"/generate", "/v1/chat/completions", "/v1/completions"})
_PAUSE = frozenset({"/pause_generation"})
_NOWHERE = "2.2.2.2"
"""SGLang's name of a decode server that there is not: the prefill server answers, and sends nothing."""
_ROOM_BITS = 62
_PATIENCE_S = 600.0
"""Of a request, for a prefill server to take the place of one that was lost; of its workers, for its first process."""
_SETTLING_S = 60
"""Of a pause, for requests that nobody waits for to end."""
_POLL_S = 0.2
_OF_PROMPT = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")


def install(mode: str) -> None:
    """Put it in front of the server of this process, which is about to begin."""
    from sglang.srt.entrypoints.http_server import app

    app.add_middleware({"prefill": Prefill, "decode": Decode}[mode])


def install_patience() -> None:
    """Let the workers of a prefill server wait for the place at which they register.

    Its first process opens that beside their start, and SGLang's own patience, a quarter of a minute, may end before: a
    server that nobody finds would serve.
    """
    from sglang.srt.disaggregation.common.conn import CommonKVManager

    CommonKVManager._register_topology_row = when_listening(CommonKVManager._register_topology_row)


def when_listening(register: Callable[..., None]) -> Callable[..., None]:
    """``register(manager, url, payload)``, called as soon as somebody listens at ``url``, and at the deadline."""

    @wraps(register)
    def register_later(manager: Any, url: str, payload: Any) -> None:
        parts, deadline = urlsplit(url), time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            try:
                socket.create_connection((parts.hostname or "", parts.port or 80), timeout=_POLL_S).close()
                break
            except OSError:
                time.sleep(_POLL_S)
        register(manager, url, payload)

    return register_later


class RefusedError(Exception):
    """A prefill server answered, and not with 200."""

    def __init__(self, url: str, status: int, text: str) -> None:
        super().__init__(f"{url} answered {status}: {text[:300]}")
        self.status = status


class _Server(ABC):
    """What servers of both kinds do around the requests that they share."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._clients: set[asyncio.Event] = set()
        """Of the requests that are computed here; set when nobody waits for the answer any more."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if _is_post(scope, _PAIRED):
            await self._generate(scope, receive, send)
        elif _is_post(scope, _PAUSE):
            await self._pause(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    @abstractmethod
    async def _generate(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request for tokens."""

    async def _pause(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pause when what nobody waits for has ended: a paused server ends nothing, and could not be flushed."""
        body = await _body(receive)
        if b'"in_place"' not in body and all(gone.is_set() for gone in self._clients):
            flush = {"path": "/flush_cache", "raw_path": b"/flush_cache", "query_string": b"timeout=%d" % _SETTLING_S}
            await self._app(*_replaced({**scope, **flush}, b"", asyncio.Event()), _to_nobody)
        await self._app(*_replaced(scope, body, asyncio.Event()), send)

    @contextmanager
    def _client(self, receive: Receive) -> Iterator[asyncio.Event]:
        """While a request is computed: the event that nobody waits for its answer any more."""
        gone = asyncio.Event()
        self._clients.add(gone)
        listening = asyncio.create_task(_hear_end(receive, gone))
        try:
            yield gone
        finally:
            listening.cancel()
            self._clients.remove(gone)


class Prefill(_Server):
    """A prefill server also answers requests of its own, which no decode server goes on with."""

    async def _generate(self, scope: Message, receive: Receive, send: Send) -> None:
        request = await _request(receive, send)
        if request is None:
            return
        if "bootstrap_host" not in request:
            request |= {"bootstrap_host": _NOWHERE, "bootstrap_room": 0}
        with self._client(receive) as gone:
            await self._app(*_replaced(scope, json.dumps(request).encode(), gone), send)


class Decode(_Server):
    """Pairs every request with one to a prefill server; they take turns."""

    def __init__(self, app: App) -> None:
        super().__init__(app)
        self._servers: list[dict[str, Any]] = []
        self._some = asyncio.Event()
        """There are any."""
        self._turn = itertools.count()
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if _is_post(scope, {SERVERS_PATH}):
            self._know(json.loads(await _body(receive))["servers"])
            await _answer(send, 200, {"success": True})
        else:
            await super().__call__(scope, receive, send)

    async def _generate(self, scope: Message, receive: Receive, send: Send) -> None:
        request = await _request(receive, send)
        if request is None:
            return
        if "bootstrap_host" in request:  # somebody else has paired it
            with self._client(receive) as gone:
                await self._app(*_replaced(scope, json.dumps(request).encode(), gone), send)
            return
        server = await self._choose()
        if server is None:
            await _answer(send, 503, {"error": "this decode server knows no prefill server"})
            return
        request |= {
            "bootstrap_host": server["host"],
            "bootstrap_port": server["port"],
            "bootstrap_room": secrets.randbits(_ROOM_BITS),
        }
        prefill = asyncio.create_task(self._prefill(server, scope["path"], request))
        try:
            with self._client(receive) as gone:
                await self._decode(scope, request, gone, send, prefill)
        finally:
            prefill.cancel()
            await asyncio.gather(prefill, return_exceptions=True)

    async def _decode(
        self, scope: Message, request: dict[str, Any], gone: asyncio.Event, send: Send, prefill: asyncio.Task[Any]
    ) -> None:
        """Have the server of this process answer; 503 as soon as the prefill server does not."""
        begun = asyncio.Event()
        held: list[Message] | None = [] if _wants_prompt(request) else None

        async def answer(message: Message) -> None:
            if held is not None:
                held.append(message)
            elif not gone.is_set():
                begun.set()
                await send(message)

        body = json.dumps(request).encode()
        decode = asyncio.ensure_future(self._app(*_replaced(scope, body, gone), answer))
        await asyncio.wait({prefill, decode}, return_when=asyncio.FIRST_COMPLETED)
        if not decode.done() and (problem := prefill.exception()) is not None:
            gone.set()  # for this server it is as if its client had gone
            if not begun.is_set():
                await _answer_failure(send, problem)
        await decode
        if held and not gone.is_set():
            await _send_merged(send, held, prefill)

    def _know(self, servers: list[dict[str, Any]]) -> None:
        self._servers = servers
        if servers:
            self._some.set()
        else:
            self._some.clear()

    async def _choose(self) -> dict[str, Any] | None:
        """The next prefill server; when all were lost, the first one that comes."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._some.wait(), _PATIENCE_S)
        return self._servers[next(self._turn) % len(self._servers)] if self._servers else None

    async def _prefill(self, server: dict[str, Any], path: str, request: dict[str, Any]) -> Any:
        """The answer of the prefill server: an error when it has none.  Where nobody listens any more, it is lost."""
        if self._session is None:
            # A connection that is used again may be closed by the other side at that moment.
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), connector=connector)
        url = server["url"] + path
        try:
            async with self._session.post(url, json={**request, "stream": False}) as response:
                text = await response.text()
        except aiohttp.ClientConnectorError:
            self._know([other for other in self._servers if other != server])
            raise
        if response.status != 200:
            raise RefusedError(url, response.status, text)
        return json.loads(text)


async def _send_merged(send: Send, messages: list[Message], prefill: asyncio.Task[Any]) -> None:
    """Send the answer with what the prefill server says of the prompt."""
    start, *parts = messages
    body = b"".join(part.get("body", b"") for part in parts)
    if start["status"] == 200:
        await asyncio.wait({prefill})
        if (problem := prefill.exception()) is not None:
            await _answer_failure(send, problem)
            return
        body = json.dumps(_merged(json.loads(body), prefill.result())).encode()
    await send({**start, "headers": _with_length(start["headers"], body)})
    await send({"type": "http.response.body", "body": body})


def _merged(decoded: Any, prefilled: Any) -> Any:
    if isinstance(decoded, list):
        return [_merged(one, other) for one, other in zip(decoded, prefilled, strict=True)]
    of_prompt = {name: prefilled["meta_info"][name] for name in _OF_PROMPT if name in prefilled["meta_info"]}
    return {**decoded, "meta_info": {**decoded["meta_info"], **of_prompt}}


async def _answer_failure(send: Send, problem: BaseException) -> None:
    """What the prefill server has against the request, or 503 when somebody else may do better."""
    status = problem.status if isinstance(problem, RefusedError) and problem.status < 500 else 503
    await _answer(send, status, {"error": f"the prefill server failed: {problem}"})


def _is_post(scope: Message, paths: Container[str]) -> bool:
    return scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in paths


def _wants_prompt(request: dict[str, Any]) -> bool:
    """Whether log-probabilities of the prompt are asked for, which the prefill server has."""
    starts = request.get("logprob_start_len", -1)
    first = max(starts) if isinstance(starts, list) else starts
    return bool(request.get("return_logprob")) and first is not None and first >= 0 and not request.get("stream")


async def _body(receive: Receive) -> bytes:
    """What the client has sent; nothing of it when the client has gone."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _request(receive: Receive, send: Send) -> dict[str, Any] | None:
    """The client's JSON object; None when it is none, which the client has been told."""
    try:
        request = json.loads(await _body(receive))
    except ValueError as error:
        request = error
    if isinstance(request, dict):
        return request
    await _answer(send, 400, {"error": f"expected a JSON object: {request}"})
    return None


def _replaced(scope: Message, body: bytes, gone: asyncio.Event) -> tuple[Message, Receive]:
    """The client's request with another body; its client has gone when ``gone`` says so.

    Whoever asks for that waits no moment for the answer (Starlette's ``is_disconnected``), so it must be known already.
    """
    messages: Iterator[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def say() -> Message:
        for message in messages:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    return {**scope, "headers": _with_length(scope["headers"], body)}, say


async def _hear_end(receive: Receive, gone: asyncio.Event) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()


async def _to_nobody(_message: Message) -> None:
    pass


def _with_length(headers: Iterable[tuple[bytes, bytes]], body: bytes) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name.lower() not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", str(len(body)).encode())]


async def _answer(send: Send, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = _with_length([(b"content-type", b"application/json")], body)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

"""``radix_cache``: text in, the very tokens out that an engine sampled.

For agents that only handle text.  ``POST /generate`` with one ``text`` is remembered: its prompt's ids, and those the
engine sampled.  A later request whose text begins with a text remembered is sent as those ids, followed by the
ids of the rest; text that an engine wrote is never tokenized again.  ``POST /retrieve_from_text`` gives out the ids.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from miles.router.middleware import RouterHandle
from miles.router.middleware.text_tree import Record, TextTree
from miles.router.refusal import Refusal

_THREAD_FROM_CHARS = 16 * 1024  # tokenizing longer texts would hold up the event loop
_KEPT_VERSIONS = 5  # newest weight versions whose samples are remembered


class _RefusedError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.refusal = Refusal(status, message)


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt as ids; ``record`` ends with it."""

    record: Record
    ids: list[int]
    text: str


class RadixCache:
    """See the module; the interface is ``miles.router.middleware.Middleware``."""

    def __init__(self, app: ASGIApp, *, router: RouterHandle) -> None:
        self._app = app
        self._tokenizer = router.tokenizer
        self._max_body_bytes = router.settings.max_body_bytes
        self._tree = TextTree(router.settings.radix_cache_tokens)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        serve = None
        if scope["type"] == "http" and scope["method"] == "POST":
            serve = {"/generate": self._generate, "/retrieve_from_text": self._retrieve}.get(scope["path"])
        if serve is None:
            await self._app(scope, receive, send)
            return
        try:
            body = await _read(receive, self._max_body_bytes)
            if body is not None:
                await serve(scope, body, receive, send)
        except _RefusedError as error:
            await _answer(send, error.refusal.status, error.refusal.body())

    async def _generate(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        request = _object(body)
        text = request.pop("text", None)
        if not isinstance(text, str) or not text:  # token ids, or several texts
            await self._app(scope, _replay(body, receive), send)
            return
        prompt = await self._tokenized(text)
        changed = orjson.dumps(request | {"input_ids": prompt.ids, "return_logprob": True})
        lengths = (b"content-length", b"transfer-encoding")
        headers = [field for field in scope["headers"] if field[0] not in lengths]
        inner = {**scope, "headers": [*headers, (b"content-length", b"%d" % len(changed))]}
        remembering = send if request.get("stream") else _Remembering(self, prompt, send)
        await self._app(inner, _replay(changed, receive), remembering)

    async def _retrieve(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        request = _object(body)
        text = request.get("text")
        if not isinstance(text, str) or not text:
            raise _RefusedError(400, "'text' must be a text that is not empty")
        prompt = await self._tokenized(text)
        chain = prompt.record.chain()
        loss_mask = [int(part.sampled) for part in chain for _ in part.ids]
        found = {
            "response": text,
            "tokens": prompt.ids,
            "loss_mask": loss_mask,
            "token_length": len(prompt.ids),
            "loss_mask_length": len(loss_mask),
            "weight_versions": [part.version for part in chain for _ in part.ids],
        }
        if request.get("return_logp"):
            found["rollout_logp"] = [logp for part in chain for logp in part.logps]
        await _answer(send, 200, orjson.dumps(found))

    async def _tokenized(self, text: str) -> _Prompt:
        """What is remembered of ``text``, and the rest tokenized and remembered."""
        record, end = self._tree.find(text)
        rest = text[end:]
        known = [] if record is None else [token for part in record.chain() for token in part.ids]
        if record is not None and not rest:
            return _Prompt(record, known, text)
        if len(rest) < _THREAD_FROM_CHARS:
            new = self._tokenizer.encode(rest, whole=record is None)
        else:
            new = await asyncio.to_thread(self._tokenizer.encode, rest, whole=record is None)
        return _Prompt(self._tree.add(record, text, new, None, None), known + new, text)

    def remember(self, prompt: _Prompt, answer: Any) -> None:
        """Add what the engine sampled, if its answer says which tokens that are."""
        meta = answer.get("meta_info") if isinstance(answer, Mapping) else None
        sampled = meta.get("output_token_logprobs") if isinstance(meta, Mapping) else None
        if not sampled or not isinstance(meta, Mapping):
            return
        ids = [int(entry[1]) for entry in sampled]
        logps = [float(entry[0]) for entry in sampled]
        version = None if meta.get("weight_version") is None else str(meta["weight_version"])
        # A client sees the text without the token that ended it, or with it: both are ends of a text.
        visible = len(ids) - 1 if ids[-1] in self._tokenizer.special_ids else len(ids)
        record = prompt.record
        for start, end in ((0, visible), (visible, len(ids))):
            if end > start:
                text = prompt.text + self._tokenizer.decode_after(prompt.ids, ids[:end])
                record = self._tree.add(record, text, ids[start:end], logps[start:end], version)
        self._forget_old_versions(version)

    def _forget_old_versions(self, newest: str | None) -> None:
        if newest is not None and newest.isdecimal():
            limit = int(newest) - _KEPT_VERSIONS
            outdated = [one for one in self._tree.versions() if one.isdecimal() and int(one) <= limit]
            if outdated:
                self._tree.drop_versions(outdated)


class _Remembering:
    """Passes an answer on, and has its tokens remembered before the client can ask again."""

    def __init__(self, cache: RadixCache, prompt: _Prompt, send: Send) -> None:
        self._cache = cache
        self._prompt = prompt
        self._send = send
        self._good = False
        self._pieces: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._good = message["status"] == 200
        elif self._good:
            self._pieces.append(message.get("body", b""))
            if not message.get("more_body", False):
                self._remember(b"".join(self._pieces))
        await self._send(message)

    def _remember(self, body: bytes) -> None:
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            return  # what is not JSON has no tokens to remember
        self._cache.remember(self._prompt, answer)


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _RefusedError(400, f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _RefusedError(400, "the body must be a JSON object")
    return value


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The request's body; None when the client left before its end."""
    pieces, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > limit:
            raise _RefusedError(413, f"request body above {limit} bytes")
        more = message.get("more_body", False)
    return b"".join(pieces)


def _replay(body: bytes, receive: Receive) -> Receive:
    """``body`` as one piece, then whatever the client does."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})

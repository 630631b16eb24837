"""The HTTP endpoints: a plain ASGI application, since ``/generate`` must cost next to nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import parse_qs

import orjson

from miles.core.errors import EngineError
from miles.rollout.engines.embedded.chat import ChatAnswer, parse_chat
from miles.rollout.engines.embedded.engine import Engine
from miles.rollout.engines.embedded.metrics import render_metrics
from miles.rollout.engines.embedded.outbox import Outbox
from miles.rollout.engines.embedded.protocol import (
    BadRequest,
    GenerateItem,
    GenerateRequest,
    NotSupported,
    parse_generate,
    render,
)
from miles.rollout.engines.embedded.sampling import SamplingParams
from miles.rollout.engines.embedded.scheduler import Scheduler
from miles.rollout.engines.embedded.sequence import Progress, Sequence

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Result = TypeVar("Result")

_JSON = b"application/json"
_TEXT = b"text/plain; charset=utf-8"
_EVENTS = b"text/event-stream"
_HEALTH_DEADLINE_S = 20.0
_NOT_OFFERED = {
    "/load_lora_adapter": "the policy's adapter comes with its weights (/begin_weight_update), and there is no other",
    "/v1/completions": "use /generate or /v1/chat/completions",
    "/start_profile": "profile the process from outside",
    "/stop_profile": "profile the process from outside",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete response."""

    body: bytes
    status: int = 200
    content_type: bytes = _JSON

    @classmethod
    def json(cls, value: Any, status: int = 200) -> Answer:
        return cls(orjson.dumps(value), status)

    @classmethod
    def error(cls, message: str, status: int) -> Answer:
        """In SGLang's form."""
        return cls.json({"error": {"message": message, "type": "invalid_request_error", "code": status}}, status)


class Gone(Exception):
    """The client closed the connection."""


class Server:
    """ASGI application over an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._outbox: Outbox | None = None
        self._routes: dict[str, Callable[[dict[str, Any]], Awaitable[Answer]]] = {
            "/health": self._health,
            "/health_generate": self._health_generate,
            "/model_info": self._model_info,
            "/get_model_info": self._model_info,
            "/server_info": self._server_info,
            "/get_server_info": self._server_info,
            "/v1/models": self._models,
            "/metrics": self._metrics,
            "/abort_request": self._abort,
            "/flush_cache": self._flush,
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/begin_weight_update": self._begin_update,
            "/end_weight_update": self._end_update,
            "/update_weights_from_tensor": self._update_from_tensor,
            "/update_weights_from_disk": self._update_from_disk,
            "/init_weights_update_group": self._join_group,
            "/update_weights_from_distributed": self._update_from_distributed,
            "/destroy_weights_update_group": self._leave_group,
            "/update_weight_version": self._set_version,
            "/get_weights_by_name": self._weights_by_name,
            "/weights_checker": self._check_weights,
            "/release_memory_occupation": self._release_memory,
            "/resume_memory_occupation": self._resume_memory,
        }

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if self._outbox is None:
            self._outbox = Outbox(asyncio.get_running_loop())
        try:
            await self._respond(scope, receive, send)
        except Gone:
            pass
        except (BadRequest, EngineError) as error:
            status = (
                error.status if isinstance(error, BadRequest) else 400 if self.engine.runner.failure is None else 503
            )
            await _send(send, Answer.error(str(error), status))

    async def _respond(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        path = scope["path"]
        body = await _read(receive)
        if path == "/generate":
            await self._generate(parse_generate(_object(body)), receive, send)
        elif path == "/v1/chat/completions":
            await self._chat(_object(body), receive, send)
        elif path in self._routes:
            given = _object(body) if body else {k: v[-1] for k, v in parse_qs(scope["query_string"].decode()).items()}
            await _send(send, await self._routes[path](given))
        elif path in _NOT_OFFERED:
            raise NotSupported(f"the embedded engine does not offer {path}: {_NOT_OFFERED[path]}")
        else:
            await _send(send, Answer.error(f"there is no endpoint {path}", 404))

    # -- generation ----------------------------------------------------------------------------------------------

    async def _generate(self, request: GenerateRequest, receive: Receive, send: Send) -> None:
        if request.stream:
            item = request.items[0]
            events = self._stream(item, receive)
            await _send_events(send, (self._render(item, progress) async for progress in events))
            return
        answers = await self._complete(request.items, receive)
        single = not request.batched and len(answers) == 1
        await _send(send, Answer.json(answers[0] if single else answers))

    def _render(self, item: GenerateItem, progress: Progress) -> dict[str, Any]:
        return render(progress, item, self.engine.response_text(progress))

    async def _complete(self, items: list[GenerateItem], receive: Receive) -> list[dict[str, Any]]:
        finals = await self.run(items, receive)
        owners = [item for item in items for _ in range(item.params.n)]
        return [self._render(item, progress) for item, progress in zip(owners, finals, strict=True)]

    async def run(self, items: list[GenerateItem], receive: Receive | None) -> list[Progress]:
        """Generate all responses; raise Gone, and end them, when the client leaves before."""
        assert self._outbox is not None
        loop = asyncio.get_running_loop()
        finals: dict[Sequence, Progress] = {}
        done: asyncio.Future[None] = loop.create_future()

        def finished(progress: Progress) -> None:
            finals[progress.sequence] = progress
            if len(finals) == len(sequences) and not done.done():
                done.set_result(None)

        notify = partial(self._outbox.put, finished)
        sequences = [sequence for item in items for sequence in self.engine.prepare(item, notify)]
        self.engine.submit(sequences)
        try:
            await _unless_gone(done, receive)
        except BaseException:
            self.engine.withdraw(sequences)
            raise
        return [finals[sequence] for sequence in sequences]

    async def _stream(self, item: GenerateItem, receive: Receive) -> AsyncIterator[Progress]:
        """Progress of one response as it comes."""
        assert self._outbox is not None
        queue: asyncio.Queue[Progress] = asyncio.Queue()
        sequences = self.engine.prepare(item, partial(self._outbox.put, queue.put_nowait), stream=True)
        self.engine.submit(sequences)
        try:
            while True:
                progress = await _unless_gone(asyncio.ensure_future(queue.get()), receive)
                yield progress
                if progress.finish is not None:
                    return
        finally:
            self.engine.withdraw(sequences)

    async def _chat(self, body: dict[str, Any], receive: Receive, send: Send) -> None:
        request = parse_chat(body, self.engine)
        prompt = await asyncio.to_thread(self.engine.text.chat, *request.conversation)
        item = request.item(prompt)
        answer = ChatAnswer(self.engine, request)
        if request.stream:
            events = self._stream(item, receive)
            await _send_events(send, (chunk async for progress in events for chunk in answer.chunks(progress)))
        else:
            await _send(send, Answer.json(answer.whole(await self.run([item], receive))))

    # -- health and facts ----------------------------------------------------------------------------------------

    async def _health(self, _: dict[str, Any]) -> Answer:
        if self.engine.runner.failure is not None:
            return Answer.error(f"the engine failed: {self.engine.runner.failure!r}", 503)
        return Answer(b"", content_type=_TEXT)

    async def _health_generate(self, body: dict[str, Any]) -> Answer:
        """Whether a token can be made.

        While tokens are being made, or must not be, it is whether the model thread answers, which it does between two
        steps; a request of our own would wait behind the others.
        """
        scheduler = self.engine.scheduler
        try:
            async with asyncio.timeout(_HEALTH_DEADLINE_S):
                if await self._call(self.engine.runner.call(_makes_no_token_now)):
                    return Answer(b"", content_type=_TEXT)
                params = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
                item = GenerateItem(rid=None, text=None, input_ids=[0], params=params)
                await self.run([item], None)
        except TimeoutError:
            message = f"no token within {_HEALTH_DEADLINE_S:.0f} s; {len(scheduler.waiting)} requests are waiting"
            return Answer.error(message, 503)
        return Answer(b"", content_type=_TEXT)

    async def _model_info(self, _: dict[str, Any]) -> Answer:
        engine = self.engine
        return Answer.json(
            {
                "model_path": engine.updates.model_path,
                "served_model_name": engine.name,
                "tokenizer_path": str(engine.checkpoint.path),
                "is_generation": True,
                "weight_version": engine.scheduler.version,
                "model_type": engine.checkpoint.config.get("model_type"),
                "architectures": engine.checkpoint.config.get("architectures"),
                "max_context_length": engine.context_length,
                "vocab_size": engine.model.vocab_size,
            }
        )

    async def _server_info(self, _: dict[str, Any]) -> Answer:
        return Answer.json(await self._call(self.engine.runner.call(lambda _: self.engine.facts())))

    async def _models(self, _: dict[str, Any]) -> Answer:
        model = {"id": self.engine.name, "object": "model", "owned_by": "miles", "root": self.engine.name}
        return Answer.json({"object": "list", "data": [{**model, "max_model_len": self.engine.context_length}]})

    async def _metrics(self, _: dict[str, Any]) -> Answer:
        facts = await self._call(self.engine.runner.call(lambda _: self.engine.facts()))
        return Answer(render_metrics(facts, self.engine.name).encode(), content_type=_TEXT)

    # -- control -------------------------------------------------------------------------------------------------

    async def _abort(self, body: dict[str, Any]) -> Answer:
        if not body.get("abort_all") and not body.get("rid"):
            raise BadRequest("give a rid, or abort_all")
        count = await self._call(self.engine.abort(None if body.get("abort_all") else str(body["rid"])))
        return Answer.json({"success": True, "message": f"aborted {count} requests"})

    async def _flush(self, _: dict[str, Any]) -> Answer:
        if await self._call(self.engine.flush()):
            return Answer(b"Cache flushed.\n", content_type=_TEXT)
        return Answer(b"The cache was not flushed: requests are running.\n", 400, _TEXT)

    async def _pause(self, body: dict[str, Any]) -> Answer:
        await self._call(self.engine.pause(body))
        return Answer.json({"status": "ok", "message": "Generation paused successfully."})

    async def _continue(self, _: dict[str, Any]) -> Answer:
        await self._call(self.engine.resume())
        return Answer.json({"status": "ok", "message": "Generation continued successfully."})

    async def _begin_update(self, body: dict[str, Any]) -> Answer:
        return await self._update(self.engine.updates.begin(body))

    async def _end_update(self, _: dict[str, Any]) -> Answer:
        return await self._update(self.engine.updates.end())

    async def _update_from_tensor(self, body: dict[str, Any]) -> Answer:
        return await self._update(self.engine.updates.from_tensor(body), "checksums")

    async def _update_from_disk(self, body: dict[str, Any]) -> Answer:
        return await self._update(self.engine.updates.from_disk(body), "checksums")

    async def _update_from_distributed(self, body: dict[str, Any]) -> Answer:
        return await self._update(self.engine.updates.from_distributed(body), "checksums")

    async def _join_group(self, body: dict[str, Any]) -> Answer:
        return await self._change_group(self.engine.updates.join_group(body))

    async def _leave_group(self, body: dict[str, Any]) -> Answer:
        return await self._change_group(self.engine.updates.leave_group(body))

    async def _change_group(self, change: Awaitable[None]) -> Answer:
        try:
            await change
        except EngineError as error:
            return Answer.json({"success": False, "message": str(error)}, 400)
        return Answer.json({"success": True, "message": ""})

    async def _set_version(self, body: dict[str, Any]) -> Answer:
        return await self._update(self.engine.updates.set_version(body))

    async def _check_weights(self, body: dict[str, Any]) -> Answer:
        try:
            return Answer.json(await self._call(self.engine.updates.check(body.get("action", "checksum"))))
        except EngineError as error:
            return Answer.json({"success": False, "message": str(error)}, 400)

    async def _weights_by_name(self, body: dict[str, Any]) -> Answer:
        return Answer.json(
            await self._call(self.engine.updates.by_name(body.get("name"), int(body.get("truncate_size", 100))))
        )

    async def _release_memory(self, body: dict[str, Any]) -> Answer:
        return await self._update(self.engine.memory.release(body), "released_bytes")

    async def _resume_memory(self, body: dict[str, Any]) -> Answer:
        return await self._update(self.engine.memory.resume(body))

    async def _update(self, future: Future[Result], key: str | None = None) -> Answer:
        """Answer in the form of the weight endpoints."""
        try:
            result = await self._call(future)
        except EngineError as error:
            return Answer.json({"success": False, "message": str(error)}, 400)
        return Answer.json({"success": True, "message": "", **({} if key is None else {key: result})})

    @staticmethod
    async def _call(future: Future[Result]) -> Result:
        return await asyncio.wrap_future(future)


def _makes_no_token_now(scheduler: Scheduler) -> bool:
    """Whether a request of our own would wait for others, or for weights and memory."""
    without_weights = scheduler.released or scheduler.model.weights.unsent
    return not scheduler.idle or scheduler.paused or scheduler.updating or bool(without_weights)


async def _unless_gone(wanted: asyncio.Future[Result], receive: Receive | None) -> Result:
    """The result of ``wanted``; raise Gone when the client closes the connection first."""
    if receive is None:
        return await wanted
    leaving = asyncio.ensure_future(receive())
    try:
        await asyncio.wait((wanted, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not wanted.done():
            raise Gone
        return wanted.result()
    finally:
        wanted.cancel()
        leaving.cancel()


async def _read(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object")
    return value


async def _send(send: Send, answer: Answer) -> None:
    headers = [(b"content-type", answer.content_type), (b"content-length", str(len(answer.body)).encode())]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


async def _send_events(send: Send, events: AsyncIterator[dict[str, Any]]) -> None:
    """Server-sent events, ended by ``[DONE]``.  What is wrong before the first event is answered as an error."""
    started = False
    async with contextlib.aclosing(events) as stream:  # type: ignore[type-var]
        async for event in stream:
            if not started:
                headers = [(b"content-type", _EVENTS), (b"cache-control", b"no-cache")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                started = True
            data = b"data: " + orjson.dumps(event) + b"\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

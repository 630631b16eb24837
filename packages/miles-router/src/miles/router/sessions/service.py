"""``/sessions``: the endpoints."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import orjson
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from miles.core.continuation import MAX_TRIM_TOKENS, Continuation, TemplateRefusalError
from miles.router.asgi import AsgiProxy
from miles.router.dispatcher import Dispatcher
from miles.router.fanout import FAN_OUT_PATHS
from miles.router.fetch import FetchedResponse
from miles.router.inner import RefusedError, ask
from miles.router.refusal import Refusal
from miles.router.sessions import chat
from miles.router.sessions.messages import BadMessageError
from miles.router.sessions.mismatch import count_mismatches
from miles.router.sessions.samples import SampleError, assemble
from miles.router.sessions.speech import Listener
from miles.router.sessions.store import Session, SessionStore, TooManySessionsError
from miles.router.sessions.template import ChatTemplate
from miles.router.sessions.trajectory import Generation, Plan, Trajectory, Turn, accumulate, make_plan
from miles.router.sessions.wire import write_samples
from miles.router.settings import Settings

_ROUTING_HEADER = b"x-smg-routing-key"
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
_MAX_SAMPLES_BODY_BYTES = 64 * 1024

Result = TypeVar("Result")


class SessionError(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.refusal = Refusal(status, message, retry_after_s)


class SessionService:
    """Sessions over the fleet of ``dispatcher``.  ``close`` ends its thread."""

    def __init__(
        self,
        settings: Settings,
        template: ChatTemplate,
        continuation: Continuation,
        listener: Listener,
        dispatcher: Dispatcher,
    ) -> None:
        self._settings = settings
        self._template = template
        self._tokenizer = template.tokenizer
        self._continuation = continuation
        self._dispatcher = dispatcher
        self._store = SessionStore(settings.max_sessions, settings.session_idle_timeout_s)
        self._listener = listener
        # Rendering and tokenizing long conversations takes milliseconds, in which the event loop must go on.
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="sessions")

    def attach(self, app: FastAPI) -> None:
        """Add the endpoints to ``app``."""
        routes = APIRouter(prefix="/sessions")
        routes.post("")(self.create)
        routes.get("/{identity}")(self.show)
        routes.delete("/{identity}")(self.delete)
        routes.post("/{identity}/samples")(self.samples)
        routes.post("/{identity}/v1/chat/completions")(self.complete)
        routes.api_route("/{identity}/{path:path}", methods=_METHODS)(self.forward)
        app.include_router(routes)
        app.add_exception_handler(SessionError, _answer_error)

    def close(self) -> None:
        """End the thread; what it does is abandoned."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # Endpoints.

    async def create(self) -> dict[str, str]:
        """Open a session."""
        try:
            return {"session_id": self._store.create().identity}
        except TooManySessionsError as error:
            raise SessionError(503, str(error), 1) from error

    async def show(self, identity: str) -> Response:
        """What was recorded, and how it compares with the template's own rendering."""
        session = self._known(identity)
        metadata = {
            "accumulated_token_ids": session.trajectory.ids,
            "max_trim_tokens": MAX_TRIM_TOKENS,
            "num_unrecorded": session.num_unrecorded,
            "num_rollbacks": session.num_rollbacks,
        }
        if session.trajectory.turns:
            mismatch = await self._in_thread(self._count_mismatches, list(session.trajectory.turns), session.trajectory)
            metadata["tito_session_mismatch"] = mismatch
        return _json({"session_id": session.identity, "records": session.records, "metadata": metadata})

    async def delete(self, identity: str) -> Response:
        """Forget a session; what it generates is aborted."""
        self._store.delete(self._known(identity))
        return Response(status_code=204)

    async def samples(self, identity: str, request: Request) -> Response:
        """The session as training samples."""
        session = self._known(identity)
        body = await _object(request, _MAX_SAMPLES_BODY_BYTES)
        limit = body.get("max_seq_len")
        if limit is not None and (type(limit) is not int or limit < 1):
            raise SessionError(400, f"max_seq_len {limit!r}: expected a number of tokens, or null")
        turns = list(session.trajectory.turns)
        try:
            samples = await self._in_thread(assemble, turns, self._tokenizer, limit)
        except SampleError as error:
            raise SessionError(422, str(error)) from error
        if "application/json" in request.headers.get("accept", ""):
            return _json({"samples": [sample.as_json() for sample in samples]})
        wire = await self._in_thread(write_samples, samples)
        return Response(wire, media_type="application/octet-stream")

    async def complete(self, identity: str, request: Request) -> Response:
        """Answer as OpenAI's chat completions do, and record what was sampled."""
        session = self._known(identity)
        body = await _object(request, self._settings.max_body_bytes)
        work = asyncio.create_task(self._answer(session, body))
        session.under_way.add(work)
        leaving = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            work.cancel()  # which does nothing when it is done
            session.under_way.discard(work)
        try:
            return await work
        except asyncio.CancelledError:
            raise SessionError(404, f"session {identity} was deleted") from None

    async def forward(self, identity: str, path: str) -> Response:
        """Everything else goes to a worker, the same one while the policy is sticky."""
        session = self._known(identity)
        if f"/{path}" in FAN_OUT_PATHS:
            raise SessionError(404, f"/{path} concerns all sessions: send it to the router itself")
        return _Forward(self._dispatcher, session.identity)

    # Inside.

    def _known(self, identity: str) -> Session:
        session = self._store.get(identity)
        if session is None:
            raise SessionError(404, f"there is no session {identity}")
        return session

    async def _answer(self, session: Session, body: dict[str, Any]) -> Response:
        try:
            request = chat.read_chat(body)
            async with session.planning:
                plan = await self._plan(session.trajectory, request)
                num_commits = session.num_commits
        except (chat.BadRequestError, BadMessageError, TemplateRefusalError) as error:
            raise SessionError(400, str(error)) from error
        answer = await self._generate(session, request, plan)
        if answer.status != 200:
            return _passed_on(answer)
        try:
            parsed = orjson.loads(answer.body)
            generation = chat.read_generation(parsed)
        except (orjson.JSONDecodeError, chat.BadAnswerError) as error:
            raise SessionError(502, f"bad answer of a worker: {error}") from error
        reply = await self._in_thread(
            chat.make_reply, self._tokenizer, self._listener, request, plan.ids, parsed, generation
        )
        if session.num_commits == num_commits:
            self._commit(session, request, plan, reply, generation)
        else:
            session.num_unrecorded += 1
        logprobs = chat.openai_logprobs(self._tokenizer, parsed) if request.logprobs else None
        completion = chat.completion(request, reply, generation, len(plan.ids), logprobs)
        if not request.stream:
            return _json(completion)
        events = chat.stream_events(completion, include_usage=request.include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})

    async def _plan(self, trajectory: Trajectory, request: chat.ChatRequest) -> Plan:
        kept = trajectory.kept_turns(request.messages, request.tools)
        turns = trajectory.turns[:kept]
        arguments = (self._template, self._continuation, turns, request.messages, request.tools, request.variables)
        return await self._in_thread(make_plan, *arguments)

    async def _generate(self, session: Session, request: chat.ChatRequest, plan: Plan) -> FetchedResponse:
        payload = request.payload(plan.ids, routed_experts=self._settings.session_routed_experts)
        payload.setdefault("rid", uuid.uuid4().hex)
        headers = [(b"content-type", b"application/json"), (_ROUTING_HEADER, session.identity.encode())]
        try:
            return await ask(self._dispatcher, "POST", "/generate", headers, orjson.dumps(payload))
        except RefusedError as error:
            raise SessionError(error.refusal.status, error.refusal.message, error.refusal.retry_after_s) from error

    def _commit(
        self,
        session: Session,
        request: chat.ChatRequest,
        plan: Plan,
        reply: dict[str, Any],
        generation: Generation,
    ) -> None:
        session.num_commits += 1
        session.num_rollbacks += len(session.trajectory.turns) - plan.kept
        turn = Turn(plan.messages, reply, plan.trimmed, plan.added, generation)
        session.trajectory.commit(plan, turn, request.tools)
        del session.records[plan.kept :]
        session.records.append(_record(turn, len(plan.ids)))

    def _count_mismatches(self, turns: list[Turn], trajectory: Trajectory) -> dict[str, int]:
        ids = accumulate(turns)
        sampled = _sampled(turns)
        rest = self._continuation.end_of_turn(ids)
        canonical = self._tokenizer.encode(
            self._template.render(trajectory.messages(), tools=trajectory.tools, prompt=False)
        )
        return count_mismatches(self._tokenizer, ids + rest, sampled + [False] * len(rest), canonical)

    async def _in_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *arguments))


class _Forward(Response):
    """The answer of a worker to a request below ``/sessions/ID/``."""

    def __init__(self, dispatcher: Dispatcher, identity: str) -> None:
        super().__init__()
        self._proxy = AsgiProxy(dispatcher)
        self._identity = identity.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw_path: bytes = scope["raw_path"]
        headers = [field for field in scope["headers"] if field[0] != _ROUTING_HEADER]
        changed = {
            "raw_path": b"/" + raw_path.split(b"/", 3)[3],
            "headers": [*headers, (_ROUTING_HEADER, self._identity)],
        }
        await self._proxy({**scope, **changed}, receive, send)


def _record(turn: Turn, num_prompt_tokens: int) -> dict[str, Any]:
    """A turn as ``GET /sessions/ID`` shows it."""
    generation = turn.generation
    return {
        "messages": turn.messages,
        "reply": turn.reply,
        "num_prompt_tokens": num_prompt_tokens,
        "trimmed_token_ids": turn.trimmed,
        "added_token_ids": turn.added,
        "output_token_ids": generation.output,
        "output_logprobs": generation.logps,
        "finish_reason": generation.finish,
        "weight_versions": generation.versions,
        "cached_tokens": generation.cached_tokens,
    }


def _sampled(turns: list[Turn]) -> list[bool]:
    """For each token of ``accumulate(turns)`` whether an engine sampled it."""
    sampled: list[bool] = []
    for turn in turns:
        del sampled[len(sampled) - turn.trimmed :]
        sampled += [False] * len(turn.added) + [True] * len(turn.generation.output)
    return sampled


def _passed_on(answer: FetchedResponse) -> Response:
    """A worker's answer as it is, framing aside."""
    kept = dict(field for field in answer.headers if field[0] == b"content-type")
    return Response(answer.body, answer.status, media_type=kept.get(b"content-type", b"application/json").decode())


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


async def _object(request: Request, limit: int) -> dict[str, Any]:
    """The body as a JSON object; an empty one is an empty object."""
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > limit:
            raise SessionError(413, f"request body above {limit} bytes")
        pieces.append(piece)
    try:
        value = orjson.loads(b"".join(pieces) or b"{}")
    except orjson.JSONDecodeError as error:
        raise SessionError(400, f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise SessionError(400, "the body must be a JSON object")
    return value


async def _disconnected(request: Request) -> None:
    await request.receive()  # the body has been read: the only thing left to come


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SessionError)
    refusal = error.refusal
    headers = {} if refusal.retry_after_s is None else {"retry-after": str(refusal.retry_after_s)}
    return Response(refusal.body(), refusal.status, headers, "application/json")

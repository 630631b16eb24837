"""The reward service: the other end of ``--rm-type remote_rm``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from miles.core.protocols.reward import RewardOutcome, Score
from miles.core.types.sample import Sample
from miles.rewards.catalogue import Catalogue
from miles.rewards.context import Context, Settings
from miles.rewards.scorer import Scorer
from miles.rewards.totals import Totals


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for."""

    body_bytes: int = 16 << 20
    batch: int = 1024


class Item(BaseModel):
    """One response to grade."""

    response: str
    label: Any = None
    prompt: str | list[dict[str, Any]] = ""
    metadata: dict[str, Any] = Field(default_factory=dict)
    rm_type: str | None = None
    """One of the types that the service offers; the first of them when it is missing."""


class Graded(BaseModel):
    """The outcome of one item."""

    score: Score
    category: str
    detail: str
    seconds: float
    failed: bool


class Batch(BaseModel):
    """Items to grade together."""

    items: list[Item]


def create_app(rm_types: list[str], settings: Settings, limits: Limits | None = None) -> ASGIApp:
    """The service for ``rm_types``, which it builds at once.  Raises ConfigError when one does not exist.

    A request chooses among them and cannot name others: a dotted path from outside would be code from outside.
    """
    limits = limits or Limits()
    service = Service(rm_types, settings)
    app = FastAPI(title="miles-rewards", lifespan=service.lifespan)

    @app.post("/", summary="Grade one response; the answer is the bare reward")
    async def reward(item: Item) -> Score:
        outcome = await service.grade(item)
        if outcome.failed:
            raise HTTPException(422, {"category": outcome.category, "detail": outcome.detail})
        return outcome.score

    @app.post("/grade", summary="Grade one response")
    async def grade(item: Item) -> Graded:
        return _graded(await service.grade(item))

    @app.post("/grade/batch", summary="Grade several responses")
    async def grade_batch(batch: Batch) -> list[Graded]:
        if len(batch.items) > limits.batch:
            raise HTTPException(413, f"{len(batch.items)} items; at most {limits.batch} are graded together")
        return [_graded(outcome) for outcome in await asyncio.gather(*map(service.grade, batch.items))]

    @app.get("/health", summary="Whether it can grade: 200, or 503 and why not")
    async def health() -> dict[str, Any]:
        if problem := service.problem:
            raise HTTPException(503, problem)
        return {"status": "ok", "types": rm_types}

    @app.get("/metrics", summary="Counts and latencies for Prometheus", response_class=PlainTextResponse)
    async def metrics() -> str:
        return service.metrics()

    return BodyLimit(app, limits.body_bytes)


class Service:
    """Scorers by type, and what they did."""

    def __init__(self, rm_types: list[str], settings: Settings) -> None:
        self._context = Context(settings)
        catalogue = Catalogue(self._context)
        self._scorers: dict[str, Scorer] = {name: catalogue.scorer(name) for name in rm_types}
        self._default = rm_types[0]
        self._totals = Totals()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Start and end the workers."""
        await asyncio.to_thread(self._context.start)
        try:
            yield
        finally:
            for scorer in self._scorers.values():
                await scorer.close()
            await asyncio.to_thread(self._context.close)

    async def grade(self, item: Item) -> RewardOutcome:
        """Grade; raise HTTPException when the type is not offered."""
        name = item.rm_type or self._default
        scorer = self._scorers.get(name)
        if scorer is None:
            raise HTTPException(422, f"rm_type {name!r} is not offered; this service grades {', '.join(self._scorers)}")
        sample = Sample(prompt=item.prompt, response=item.response, label=item.label, metadata=item.metadata)
        outcome = await scorer.score(sample)
        self._totals.add(outcome)
        return outcome

    @property
    def problem(self) -> str:
        """Why it cannot grade any more; empty while it can."""
        return self._context.problem

    def metrics(self) -> str:
        """Counts and latencies by category, and of replaced workers, since the start."""
        lines = [
            *self._totals.lines(),
            "# HELP miles_rewards_workers_replaced_total Workers that were killed or died",
            "# TYPE miles_rewards_workers_replaced_total counter",
            f"miles_rewards_workers_replaced_total {self._context.num_replaced}",
        ]
        return "\n".join(lines) + "\n"


def _graded(outcome: RewardOutcome) -> Graded:
    fields = outcome._asdict()
    return Graded(**{name: fields[name] for name in Graded.model_fields})


class BodyLimit:
    """Refuses requests with more than a number of bytes, before they are held in memory."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app = app
        self._most_bytes = most_bytes
        self._refusal = f"the request is too large: at most {most_bytes} bytes are read"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._most_bytes:
            await PlainTextResponse(self._refusal, 413)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most_bytes:
                raise HTTPException(413, self._refusal)
            return message

        await self._app(scope, counted, send)

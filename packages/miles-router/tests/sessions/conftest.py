"""A router with sessions in front of a worker that says what it is told to."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chat_templates import END_TOKENS
from speaker import Speaker

from miles.core.continuation import Continuation
from miles.router.sessions.template import ChatTemplate
from miles.router.tokenizer import CheckpointTokenizer


@pytest.fixture
def template(checkpoint: Callable[[str], Path]) -> Callable[..., ChatTemplate]:
    def make(family: str = "chatml", **variables: Any) -> ChatTemplate:
        return ChatTemplate(CheckpointTokenizer(checkpoint(family)), None, variables)

    return make


@pytest.fixture
def continuation(template: Callable[..., ChatTemplate]) -> Callable[..., Continuation]:
    return lambda *arguments, **variables: Continuation(template(*arguments, **variables))


@dataclass
class Agent:
    """A client of one session."""

    router: Any
    identity: str

    async def chat(self, *messages: dict[str, Any], **fields: Any) -> Any:
        body = json.dumps({"messages": list(messages)} | fields).encode()
        return await self.router.post(f"/sessions/{self.identity}/v1/chat/completions", body)

    async def say(self, *messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
        """The message that answers ``messages``."""
        answer = await self.chat(*messages, **fields)
        assert answer.status == 200, answer.body
        return answer.json()["choices"][0]["message"]

    async def samples(self, **fields: Any) -> list[dict[str, Any]]:
        path = f"/sessions/{self.identity}/samples"
        answer = await self.router.post(path, json.dumps(fields).encode(), "accept: application/json")
        assert answer.status == 200, answer.body
        return answer.json()["samples"]

    async def show(self) -> dict[str, Any]:
        return (await self.router.get(f"/sessions/{self.identity}")).json()


@dataclass
class Stage:
    """A router with sessions, its worker, and what that says."""

    router: Any
    worker: Any
    speaker: Speaker

    async def agent(self) -> Agent:
        answer = await self.router.post("/sessions", b"")
        return Agent(self.router, answer.json()["session_id"])


MakeStage = Callable[..., Awaitable[Stage]]


@pytest.fixture
def make_stage(
    make_worker: Any, make_router: Any, checkpoint: Callable[[str], Path]
) -> Callable[..., Awaitable[Stage]]:
    async def make(*texts: str, family: str = "chatml", **settings: Any) -> Stage:
        directory = checkpoint(family)
        speaker = Speaker(CheckpointTokenizer(directory), END_TOKENS[family], list(texts) or ["well"])
        worker = await make_worker(speaker)
        router = await make_router(worker, sessions=True, tokenizer=directory, **settings)
        return Stage(router, worker, speaker)

    return make

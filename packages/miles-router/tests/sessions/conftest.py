"""A worker that says what it is told to, as tokens, and a router with sessions in front of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from chat_templates import END_TOKENS, write_checkpoint

from miles.router.sessions.increments import Increments
from miles.router.sessions.template import ChatTemplate
from miles.router.tokenizer import CheckpointTokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of a family, without weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return lambda family: write_checkpoint(folder / family, family)


@pytest.fixture
def template(checkpoint: Callable[[str], Path]) -> Callable[..., ChatTemplate]:
    def make(family: str = "chatml", **variables: Any) -> ChatTemplate:
        return ChatTemplate(CheckpointTokenizer(checkpoint(family)), None, variables)

    return make


@pytest.fixture
def increments(template: Callable[..., ChatTemplate]) -> Callable[..., Increments]:
    return lambda *arguments, **variables: Increments(template(*arguments, **variables))


@dataclass
class Speaker:
    """What a worker's model says, one text after the other; the last one again and again."""

    tokenizer: CheckpointTokenizer
    end: str
    texts: list[str]
    finish: str = "stop"
    version: Any = "3"
    extra: dict[str, Any] = field(default_factory=dict)
    prompts: list[list[int]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def __call__(self, conversation: Any) -> None:
        body = conversation.request.json()
        self.bodies.append(body)
        self.prompts.append(body["input_ids"])
        await conversation.answer(json.dumps(self.answer(body)).encode())

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        ids = self.tokenizer.encode(text + (self.end if self.finish == "stop" else ""))
        finish: dict[str, Any] = {"type": self.finish}
        if self.finish == "stop":
            finish["matched"] = ids[-1]
        meta = {
            "finish_reason": finish,
            "completion_tokens": len(ids),
            "output_token_logprobs": [[-0.5 - n, token, None] for n, token in enumerate(ids)],
            "weight_version": self.version,
            "cached_tokens": 2,
        }
        return {"text": text, "output_ids": ids, "meta_info": meta | self.extra}


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

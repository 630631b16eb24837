"""Fakes for this package's tests: an engine, a reward dispatcher, a data source, a tokenizer."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from aiohttp import web
from served_app import ServedApp
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from miles.core.errors import EngineError
from miles.core.protocols.reward import RewardOutcome
from miles.core.types.sample import Group, Sample

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

Payload = dict[str, Any]


def save_tokenizer(directory: Path, template: str = CHATML, specials: Sequence[str] = tuple(SPECIAL)) -> Path:
    """A byte-level tokenizer without merges: every byte is a token, specials follow."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=specials[-1], pad_token=specials[0])
    fast.chat_template = template
    fast.save_pretrained(directory)
    return directory


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answer(payload: Payload, *, version: str = "3", finish: str = "stop", num_tokens: int = 4) -> dict[str, Any]:
    """What an engine answers: tokens that depend on the prompt and the sampling seed alone."""
    key = json.dumps([payload["input_ids"], payload["sampling_params"].get("sampling_seed")])
    digest = hashlib.sha256(key.encode()).digest()
    budget = payload["sampling_params"].get("max_new_tokens")
    count = num_tokens if budget is None else min(num_tokens, budget)
    tokens = [byte % 64 for byte in digest[:count]]
    return {
        "text": "".join(chr(97 + token % 26) for token in tokens),
        "meta_info": {
            "finish_reason": {"type": finish},
            "output_token_logprobs": [[-0.1 - token / 128, token, None] for token in tokens],
            "weight_version": version,
            "prompt_tokens": len(payload["input_ids"]),
            "completion_tokens": count,
            "cached_tokens": len(payload["input_ids"]) // 2,
        },
    }


class FakeServer(ServedApp):
    """Engine and router in one: answers ``/generate``, takes aborts, counts requests.  Runs in a thread of its own.

    ``respond`` maps a payload to an answer, or to an HTTP status to fail with; ``hold(payload)`` makes a request wait
    for the next abort, which it then answers with the tokens it has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.respond: Callable[[Payload], Any] = answer
        self.hold: Callable[[Payload], bool] = lambda payload: False
        self.payloads: list[Payload] = []
        self.headers: list[dict[str, str]] = []
        self.num_aborts = 0
        self.healthy = True
        self.version: str | None = None
        self.in_flight = self.most_in_flight = 0
        self.refusals = 0
        """How often the cache is not flushed: requests are running."""
        self.memory: list[tuple[str, tuple[str, ...]]] = []
        self.loaded: list[str] = []
        self._aborted = asyncio.Event()
        for path, handler in (
            ("/generate", self._generate),
            ("/abort_request", self._abort),
            ("/add_worker", self._ok),
            ("/remove_worker", self._ok),
            ("/flush_cache", self._flush),
            ("/release_memory_occupation", self._release),
            ("/resume_memory_occupation", self._resume),
            ("/update_weights_from_disk", self._load),
        ):
            self.app.router.add_post(path, handler)
        for path, handler in (
            ("/health", self._ok),
            ("/health_generate", self._health),
            ("/model_info", self._model_info),
            ("/server_info", self._server_info),
        ):
            self.app.router.add_get(path, handler)

    def __exit__(self, *exc: object) -> None:
        self._aborted.set()
        super().__exit__(*exc)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def _flush(self, request: web.Request) -> web.Response:
        self.refusals -= 1
        return web.Response(status=400 if self.refusals >= 0 else 200)

    async def _release(self, request: web.Request) -> web.Response:
        self.memory.append(("release", tuple((await request.json())["tags"])))
        return web.json_response({"success": True, "released_bytes": 11})

    async def _resume(self, request: web.Request) -> web.Response:
        self.memory.append(("resume", tuple((await request.json())["tags"])))
        return web.json_response({"success": True})

    async def _load(self, request: web.Request) -> web.Response:
        self.loaded.append((await request.json())["model_path"])
        return web.json_response({"success": True})

    async def _generate(self, request: web.Request) -> web.Response:
        payload = await request.json()
        self.payloads.append(payload)
        self.headers.append(dict(request.headers))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.hold(payload):
                await self._aborted.wait()
                return web.json_response(_each(payload, lambda one: answer(one, finish="abort", num_tokens=2)))
            await asyncio.sleep(0)
            found = _each(payload, self.respond)
        finally:
            self.in_flight -= 1
        if isinstance(found, int):
            return web.Response(status=found, text="as the test wants")
        return web.json_response(found)

    async def _abort(self, request: web.Request) -> web.Response:
        self.num_aborts += 1
        self._aborted.set()
        self._aborted.clear()
        return web.json_response({"success": True})

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.version})

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response({"model_path": "/their/model"})

    async def _ok(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "success"})


def _each(payload: Payload, respond: Callable[[Payload], Any]) -> Any:
    """The answer to one prompt, or to a list of them; a status if any of them has one."""
    if not isinstance(payload["input_ids"][0], list):
        return respond(payload)
    pairs = zip(payload["input_ids"], payload["sampling_params"], strict=True)
    found = [respond({**payload, "input_ids": ids, "sampling_params": params}) for ids, params in pairs]
    return next((status for status in found if isinstance(status, int)), found)


class FakeRewards:
    """Scores samples by ``score(sample)``; remembers which it saw.  ``group_rm``: groups are judged as a whole."""

    def __init__(
        self, score: Callable[[Sample], Any] = lambda sample: float(sample.response_length), *, group_rm: bool = False
    ) -> None:
        self._score, self._group_rm = score, group_rm
        self.scored: list[int | None] = []
        self.closed = False

    async def start(self) -> None:
        pass

    async def score(self, sample: Sample, *, evaluation: bool = False) -> RewardOutcome:
        self.scored.append(sample.index)
        return RewardOutcome(self._score(sample))

    async def score_group(self, samples: Sequence[Sample], *, evaluation: bool = False) -> list[RewardOutcome]:
        if not self._group_rm:
            return [await self.score(sample, evaluation=evaluation) for sample in samples]
        best = max(sample.tokens for sample in samples)
        return [RewardOutcome(float(sample.tokens == best)) for sample in samples]

    def metrics(self, *, evaluation: bool = False) -> dict[str, float]:
        return {"eval/reward/count": 1.0} if evaluation else {"rollout/reward/count": float(len(self.scored))}

    async def close(self) -> None:
        self.closed = True


class FakeSource:
    """Prompts ``prompt 0``, ``prompt 1`` ...; groups that are given back come first."""

    def __init__(self, num_samples: int = 2) -> None:
        self._num_samples = num_samples
        self.next_group = 0
        self.buffer: list[Group] = []

    def get_samples(self, num_samples: int) -> list[Group]:
        taken, self.buffer = self.buffer[:num_samples], self.buffer[num_samples:]
        while len(taken) < num_samples:
            taken.append(make_group(self.next_group, self._num_samples))
            self.next_group += 1
        return taken

    def add_samples(self, samples: list[Group]) -> None:
        self.buffer = sorted(self.buffer + samples, key=lambda group: group[0].group_index or 0)

    def save(self, rollout_id: int) -> None:
        pass

    def load(self, rollout_id: int | None = None) -> None:
        pass


def make_group(number: int, size: int = 2) -> Group:
    return [
        Sample(group_index=number, index=number * size + repeat, prompt=f"prompt {number}", metadata={"n": number})
        for repeat in range(size)
    ]


class FakeEngine:
    """An engine process that is the given server."""

    def __init__(self, server: FakeServer) -> None:
        self.url = server.url
        self.dead = self.stopped = False

    def wait_ready(self, deadline_s: float) -> None:
        if self.dead:
            raise EngineError(self.describe_end())

    def alive(self) -> bool:
        return not self.dead

    def describe_end(self) -> str:
        return f"the fake engine at {self.url} has ended"

    def stop(self, deadline_s: float = 10.0) -> None:
        self.stopped = True


class FakeLauncher:
    """``--rollout-engine rollout_fakes:FakeLauncher``: every engine is ``server``."""

    server: FakeServer
    specs: ClassVar[list[Any]] = []
    engines: ClassVar[list[FakeEngine]] = []

    def launch(self, spec: Any) -> FakeEngine:
        self.specs.append(spec)
        self.engines.append(FakeEngine(self.server))
        return self.engines[-1]

    def check(self, options: dict[str, Any]) -> list[str]:
        return []

from __future__ import annotations

import asyncio
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import orjson
import pytest
from session_fakes import PROMPT_IDS, FakeSessions

from miles.core.errors import EngineError, RolloutError
from miles.core.types.rollout import GenerateFnInput
from miles.core.types.sample import Sample, Status
from miles.rollout.generators import agentic
from miles.rollout.generators.agentic import Agentic
from miles.rollout.generators.experts import ExpertShape
from miles.rollout.http import JsonClient

MESSAGES = [{"role": "user", "content": "hi"}]
PARAMS = {"max_new_tokens": 9, "temperature": 0.5, "sampling_seed": 3, "no_stop_trim": True, "top_k": -1, "stop": None}


async def say(base_url: str, messages: Any, request_kwargs: dict[str, Any]) -> str:
    async with (
        aiohttp.ClientSession() as web,
        web.post(f"{base_url}/v1/chat/completions", json={"messages": messages, **request_kwargs}) as response,
    ):
        answer = await response.json()
    text: str = answer["choices"][0]["message"]["content"]
    return text


async def two_turns(base_url: str, prompt: Any, request_kwargs: dict[str, Any], metadata: dict[str, Any]) -> Any:
    first = await say(base_url, prompt, request_kwargs)
    prompt.append({"role": "assistant", "content": first})
    second = await say(base_url, [*prompt, {"role": "user", "content": "and?"}], request_kwargs)
    return {"answer": second, "reward": 0.75, "agent_metrics": {"total_tool_time": 2.5}, "task": metadata["task"]}


def synchronous(base_url: str, prompt: Any, request_kwargs: dict[str, Any], metadata: dict[str, Any]) -> None:
    body = orjson.dumps({"messages": prompt, **request_kwargs})
    request = urllib.request.Request(f"{base_url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=60).read()


async def fails(base_url: str, prompt: Any, request_kwargs: dict[str, Any], metadata: dict[str, Any]) -> None:
    await say(base_url, prompt, request_kwargs)
    raise ValueError("out of ideas")


async def fails_at_once(base_url: str, prompt: Any, request_kwargs: dict[str, Any], metadata: dict[str, Any]) -> None:
    raise ValueError("no idea")


async def hangs(base_url: str, prompt: Any, request_kwargs: dict[str, Any], metadata: dict[str, Any]) -> None:
    await say(base_url, prompt, request_kwargs)
    await asyncio.sleep(3600)


async def returns_text(base_url: str, prompt: Any, request_kwargs: dict[str, Any], metadata: dict[str, Any]) -> Any:
    return "done"


@pytest.fixture
def sessions() -> Iterator[FakeSessions]:
    sys.modules[Path(__file__).stem] = sys.modules[__name__]
    with FakeSessions() as server:
        yield server


@pytest.fixture
async def client(sessions: FakeSessions) -> AsyncIterator[JsonClient]:
    client = JsonClient(sessions.url, deadline_s=60)
    yield client
    await client.close()


async def run(client: JsonClient, agent: Any, sample: Sample | None = None, **changes: Any) -> Sample:
    path = f"{Path(__file__).stem}.{agent.__name__}"
    values = {
        "custom_agent_function_path": path,
        "agent_timeout": 20.0,
        "rollout_max_context_len": 64,
        "eval_max_context_len": 32,
    }
    args = SimpleNamespace(**{**values, **changes})
    state = SimpleNamespace(args=args, client=client, experts=changes.get("experts"), aborted=changes.get("aborted"))
    sample = Sample(prompt=MESSAGES, index=1, label="l", metadata={"task": 7}) if sample is None else sample
    output = await Agentic(args)(GenerateFnInput(state, sample, PARAMS, evaluation=changes.get("evaluation", False)))
    assert output.samples is sample
    return sample


async def test_what_the_session_recorded_becomes_the_sample(client: JsonClient, sessions: FakeSessions) -> None:
    sample = await run(client, two_turns)
    assert sample.tokens == [*PROMPT_IDS, 20, 21, 22, 23, 24]
    assert (sample.loss_mask, sample.response_length) == ([1, 1, 0, 1, 1], 5)
    assert sample.rollout_log_probs == [-0.1 / 3, -0.1 / 3, 0.0, -0.1 / 3, -0.1 / 3]
    assert (sample.status, sample.weight_versions) == (Status.COMPLETED, ["4", "4"])
    assert (sample.index, sample.label, sample.prompt) == (1, "l", [{"role": "user", "content": "hi"}])
    assert sessions.deleted == ["s0"]


async def test_what_the_agent_returns_goes_to_the_sample(client: JsonClient) -> None:
    sample = await run(client, two_turns)
    assert sample.reward == 0.75
    assert sample.non_generation_time == 2.5
    assert (sample.metadata["answer"], sample.metadata["task"], sample.metadata["round_number"]) == ("turn 2", 7, 2)
    assert "reward" not in sample.metadata


async def test_sampling_parameters_have_the_names_of_chat(client: JsonClient, sessions: FakeSessions) -> None:
    await run(client, two_turns)
    sent = {name: value for name, value in sessions.requests[0].items() if name != "messages"}
    assert sent == {"max_tokens": 9, "temperature": 0.5, "seed": 3, "top_k": -1}


async def test_the_context_limit_bounds_the_samples(client: JsonClient, sessions: FakeSessions) -> None:
    await run(client, two_turns)
    await run(client, two_turns, evaluation=True)
    assert sessions.limits == [64, 32]


async def test_a_synchronous_agent_runs_beside_the_loop(client: JsonClient) -> None:
    assert (await run(client, synchronous)).response_length == 2


async def test_experts_are_unfolded(client: JsonClient, sessions: FakeSessions) -> None:
    sessions.experts = True
    sample = await run(client, two_turns, experts=ExpertShape(3, 2))
    assert sample.rollout_routed_experts is not None
    assert sample.rollout_routed_experts.shape == (7, 3, 2)


async def test_an_agent_that_fails_leaves_what_it_had_said(client: JsonClient, sessions: FakeSessions) -> None:
    sample = await run(client, fails)
    assert (sample.status, sample.metadata["agent_error"]) == (Status.COMPLETED, "ValueError: out of ideas")
    assert sessions.deleted == ["s0"]


async def test_an_agent_that_hangs_is_cancelled(client: JsonClient) -> None:
    sample = await run(client, hangs, agent_timeout=1.5)
    assert "--agent-timeout 1.5" in sample.metadata["agent_error"]


async def test_an_agent_that_asked_nothing_fails_its_sample(client: JsonClient, sessions: FakeSessions) -> None:
    with pytest.raises(EngineError, match="asked the model nothing: ValueError: no idea"):
        await run(client, fails_at_once)
    assert sessions.deleted == ["s0"]


async def test_an_agent_must_return_a_mapping(client: JsonClient) -> None:
    with pytest.raises(RolloutError, match="returned a str, expected a mapping"):
        await run(client, returns_text)


async def test_when_the_rollout_ends_agents_are_cancelled(
    client: JsonClient, sessions: FakeSessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agentic, "_ABORT_INTERVAL_S", 0.05)
    start = time.perf_counter()
    sample = await run(client, hangs, aborted=True)
    assert (sample.status, sample.tokens) == (Status.ABORTED, [])
    assert time.perf_counter() - start < 60
    assert sessions.deleted == ["s0"]


async def test_a_router_without_sessions_is_told(client: JsonClient, sessions: FakeSessions) -> None:
    sessions.offered = False
    with pytest.raises(RolloutError, match="needs --sessions and --tokenizer"):
        await run(client, two_turns)

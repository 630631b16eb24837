"""What a router in front of real engines must do.  Subclass it with the fixture ``engines`` to test another engine."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from miles.core.ports import free_ports
from miles.core.process import ChildProcess

DEADLINE_S = 60.0
PROMPT = [10, 11, 12, 13, 14, 15]
LONG = {"max_new_tokens": 400, "ignore_eos": True, "temperature": 1.0}


@dataclass(frozen=True)
class Engines:
    """Two running engines with the same weights, and the checkpoint they hold."""

    urls: tuple[str, str]
    checkpoint: Path


@dataclass(frozen=True)
class Fleet:
    """A router in front of engines, and a client of it."""

    engines: Engines
    client: httpx.AsyncClient

    async def generate(self, input_ids: list[int] = PROMPT, url: str = "", **params: Any) -> dict[str, Any]:
        params = {"max_new_tokens": 16, "ignore_eos": True, "temperature": 1.0, "sampling_seed": 7} | params
        body = {"input_ids": input_ids, "sampling_params": params, "return_logprob": True}
        answer = await self.client.post(f"{url}/generate", json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def status(self) -> dict[str, Any]:
        return dict((await self.client.get("/router/status")).json())

    async def worker(self, url: str) -> dict[str, Any] | None:
        return next((worker for worker in (await self.status())["workers"] if worker["url"] == url), None)

    async def until(self, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The router's status as soon as ``condition`` holds of it."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition(status := await self.status()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return status

    async def idle(self) -> None:
        """Return when the router has nothing in flight, every request is accounted for, and no engine generates."""
        status = await self.until(lambda status: not status["in_flight"] and not status["queue_length"])
        requests = status["requests"]
        outcomes = ("answered", "refused", "cut", "cancelled")
        assert requests["received"] == sum(requests[outcome] for outcome in outcomes)
        async with asyncio.timeout(DEADLINE_S):
            for url in self.engines.urls:
                while (await self.client.post(f"{url}/flush_cache")).status_code != 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)


class RouterConformance:
    """The engine's answers arrive unchanged; nothing that is given up goes on; nothing is lost."""

    logp_tolerance = 1e-3

    @pytest.fixture(scope="class")
    def start_router(self, engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
        routers: list[ChildProcess] = []

        def start(*flags: str) -> str:
            (port,) = free_ports(1)
            command = [sys.executable, "-m", "miles.router", "--port", str(port), "--health-check-interval-s", "0.5"]
            command += ["--tokenizer", str(engines.checkpoint), *flags, "--worker", *engines.urls]
            log = tmp_path_factory.mktemp("router") / "router.log"
            routers.append(ChildProcess(command, log_path=log, name="router"))
            url = f"http://127.0.0.1:{port}"
            routers[-1].wait_ready(f"{url}/readiness", DEADLINE_S)
            return url

        yield start
        for router in routers:
            router.stop()

    @pytest.fixture(scope="class")
    def router_url(self, start_router: Callable[..., str]) -> str:
        return start_router("--sessions", "--policy", "round_robin")

    @pytest.fixture
    async def fleet(self, engines: Engines, router_url: str) -> AsyncIterator[Fleet]:
        async with httpx.AsyncClient(base_url=router_url, timeout=DEADLINE_S) as client:
            fleet = Fleet(engines, client)
            await fleet.until(lambda status: all(worker["is_healthy"] for worker in status["workers"]))
            yield fleet
            await fleet.idle()

    async def test_answers_are_the_engines(self, fleet: Fleet) -> None:
        own = await fleet.generate()
        direct = await fleet.generate(url=fleet.engines.urls[0])
        assert own["output_ids"] == direct["output_ids"]
        assert own["meta_info"].keys() == direct["meta_info"].keys()
        for mine, theirs in zip(
            own["meta_info"]["output_token_logprobs"], direct["meta_info"]["output_token_logprobs"]
        ):
            assert mine[0] == pytest.approx(theirs[0], abs=self.logp_tolerance)

    async def test_refusals_are_the_engines_and_no_fault_of_theirs(self, fleet: Fleet) -> None:
        body = {"input_ids": [1], "sampling_params": {"top_p": 7}}
        answers = [await fleet.client.post("/generate", json=body) for _ in range(10)]
        assert {answer.status_code for answer in answers} == {400}
        assert all(worker["is_healthy"] for worker in (await fleet.status())["workers"])

    async def test_many_at_once_are_all_answered_by_both_engines(self, fleet: Fleet) -> None:
        before = {worker["url"]: worker["answers"]["2xx"] for worker in (await fleet.status())["workers"]}
        answers = await asyncio.gather(*(fleet.generate(sampling_seed=seed) for seed in range(32)))
        assert all(len(answer["output_ids"]) == 16 for answer in answers)
        after = {worker["url"]: worker["answers"]["2xx"] for worker in (await fleet.status())["workers"]}
        assert [after[url] - before[url] for url in fleet.engines.urls] == [16, 16]

    async def test_streams_arrive_piece_by_piece(self, fleet: Fleet) -> None:
        body = {"input_ids": PROMPT, "sampling_params": LONG | {"max_new_tokens": 40}, "stream": True}
        events = []
        async with fleet.client.stream("POST", "/generate", json=body) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            async for line in answer.aiter_lines():
                if line:
                    events.append(line.removeprefix("data: "))
        assert events[-1] == "[DONE]"
        assert len(events) > 5
        assert json.loads(events[-2])["meta_info"]["completion_tokens"] == 40

    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_client_that_leaves_ends_its_generation(self, fleet: Fleet, stream: bool) -> None:
        before = (await fleet.status())["requests"]["cancelled"]
        params = LONG | {"max_new_tokens": 900}
        body = {"input_ids": PROMPT, "sampling_params": params, "rid": "mine", "stream": stream}
        async with httpx.AsyncClient(base_url=fleet.client.base_url, timeout=DEADLINE_S) as leaving:
            request = asyncio.create_task(leaving.post("/generate", json=body))
            await fleet.until(lambda status: status["in_flight"] == 1)
            request.cancel()
            await asyncio.wait([request])
        await fleet.until(lambda status: status["requests"]["cancelled"] == before + 1)
        await fleet.idle()  # much sooner than 900 tokens take

    async def test_commands_reach_every_engine(self, fleet: Fleet) -> None:
        answer = (await fleet.client.post("/flush_cache")).json()
        assert answer["success"], answer
        assert set(answer["workers"]) == set(fleet.engines.urls)

    async def test_generation_is_paused_and_continued_everywhere(self, fleet: Fleet) -> None:
        waiting = [asyncio.create_task(fleet.generate(max_new_tokens=100)) for _ in range(4)]
        await fleet.until(lambda status: status["in_flight"] == 4)
        assert (await fleet.client.post("/pause_generation", json={"mode": "in_place"})).json()["success"]
        assert (await fleet.client.post("/continue_generation", json={})).json()["success"]
        assert [len(answer["output_ids"]) for answer in await asyncio.gather(*waiting)] == [100] * 4

    async def test_abort_of_all_reaches_every_engine(self, fleet: Fleet) -> None:
        waiting = [asyncio.create_task(fleet.generate(max_new_tokens=900)) for _ in range(4)]
        await fleet.until(lambda status: status["in_flight"] == 4)
        assert (await fleet.client.post("/abort_request", json={"abort_all": True})).json()["success"]
        reasons = {answer["meta_info"]["finish_reason"]["type"] for answer in await asyncio.gather(*waiting)}
        assert reasons <= {"abort", "length"}

    async def test_an_engine_is_removed_after_what_it_has_in_flight(self, fleet: Fleet) -> None:
        gone, kept = fleet.engines.urls
        waiting = [asyncio.create_task(fleet.generate(max_new_tokens=200)) for _ in range(8)]
        await fleet.until(lambda status: status["in_flight"] == 8)
        removal = asyncio.create_task(fleet.client.post("/remove_worker", params={"url": gone}))
        assert [len(answer["output_ids"]) for answer in await asyncio.gather(*waiting)] == [200] * 8
        assert (await removal).json()["not_drained"] == 0
        assert (await fleet.client.get("/list_workers")).json() == {"urls": [kept]}
        await fleet.generate()
        await fleet.client.post("/add_worker", params={"url": gone})
        await fleet.until(lambda status: all(worker["is_healthy"] for worker in status["workers"]))

    async def test_a_session_trains_on_the_tokens_it_sampled(self, fleet: Fleet) -> None:
        session = (await fleet.client.post("/sessions")).json()["session_id"]
        messages: list[dict[str, Any]] = []
        for question in ("Calculate 1 + 2.", "And 3?", "Why?"):
            messages.append({"role": "user", "content": question})
            body = {"messages": messages, "max_tokens": 12, "temperature": 1.0}
            answer = await fleet.client.post(f"/sessions/{session}/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            messages.append(answer.json()["choices"][0]["message"])
        records = (await fleet.client.get(f"/sessions/{session}")).json()["records"]
        accept = {"accept": "application/json"}
        (sample,) = (await fleet.client.post(f"/sessions/{session}/samples", headers=accept)).json()["samples"]
        sampled = [token for token, mask in zip(_response(sample), sample["loss_mask"]) if mask]
        kept = [record["output_token_ids"] for record in records]
        kept = kept[: next((n + 1 for n, record in enumerate(records) if record["finish_reason"] != "stop"), len(kept))]
        assert sampled == [token for output in kept for token in output]
        await self._check_logps(fleet, sample)
        assert (await fleet.client.delete(f"/sessions/{session}")).status_code == 204

    async def _check_logps(self, fleet: Fleet, sample: dict[str, Any]) -> None:
        """The log-probabilities recorded are those that the engine gives to the sample's tokens."""
        body = {
            "input_ids": sample["tokens"],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        scored = (await fleet.client.post("/generate", json=body)).json()["meta_info"]["input_token_logprobs"]
        logps = [entry[0] for entry in scored][-sample["response_length"] :]
        for logp, recorded, mask in zip(logps, sample["rollout_log_probs"], sample["loss_mask"]):
            if mask:
                assert recorded == pytest.approx(logp, abs=self.logp_tolerance)

    async def test_text_comes_back_as_the_tokens_that_were_sampled(
        self, engines: Engines, start_router: Callable[..., str]
    ) -> None:
        url = start_router("--middleware", "radix_cache")
        async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as client:
            params = {"max_new_tokens": 12, "ignore_eos": True, "temperature": 1.0, "skip_special_tokens": False}
            text, sampled = "Calculate 1 + 2.", []
            for _ in range(3):
                answer = (await client.post("/generate", json={"text": text, "sampling_params": params})).json()
                sampled.append([entry[1] for entry in answer["meta_info"]["output_token_logprobs"]])
                text += answer["text"] + " and"
            found = (await client.post("/retrieve_from_text", json={"text": text, "return_logp": True})).json()
        trained = [token for token, mask in zip(found["tokens"], found["loss_mask"]) if mask]
        assert trained == [token for output in sampled for token in output]
        assert all((logp < 0) == bool(mask) for logp, mask in zip(found["rollout_logp"], found["loss_mask"]))


def _response(sample: dict[str, Any]) -> list[int]:
    tokens: list[int] = sample["tokens"]
    return tokens[len(tokens) - sample["response_length"] :]

"""The engine over real HTTP: what every engine of the protocol must answer, and what this one refuses."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
import uvicorn
import xxhash
from engine_client import GREEDY, PROMPT, Client
from engine_models import save_model
from rollout_fakes import CHATML, save_tokenizer

from miles.core.weights.bucket import buckets
from miles.core.weights.shared_ring import RingLayout, RingWriter
from miles.rollout.engines.embedded.engine import Engine, EngineOptions
from miles.rollout.engines.embedded.protocol import BadRequest, parse_generate
from miles.rollout.engines.embedded.server import Server

LONG = {"max_new_tokens": 900, "ignore_eos": True}


@dataclass
class Served:
    """A running server."""

    url: str
    engine: Engine
    path: Path
    failed: threading.Event


@pytest.fixture(scope="module")
def checkpoint_with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_model("qwen3-tied", tmp_path_factory.mktemp("served"))
    return save_tokenizer(path, CHATML)


@pytest.fixture
def served(checkpoint_with_tokenizer: Path) -> Iterator[Served]:
    failed = threading.Event()
    options = EngineOptions(str(checkpoint_with_tokenizer), max_running_requests=32, kv_bytes=1 << 26)
    engine = Engine(options, failed.set)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(512)
    server = uvicorn.Server(uvicorn.Config(Server(engine), log_level="warning", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    engine.runner.start()
    thread.start()
    yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, checkpoint_with_tokenizer, failed)
    server.should_exit = True
    thread.join(60)
    engine.runner.stop()


@pytest.fixture
async def client(served: Served) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Client(session, served.url)


async def until(condition, deadline_s: float = 60.0) -> None:
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110 - what is waited for happens on another thread
            await asyncio.sleep(0.005)


def made(served: Served) -> int:
    return served.engine.scheduler.counters.generated_tokens


# -- generation ----------------------------------------------------------------------------------------------------


async def test_tokens_log_probs_and_facts(client):
    answer = await client.generate(return_logprob=True, rid="mine")
    meta = answer["meta_info"]
    assert len(answer["output_ids"]) == 8
    assert [entry[1] for entry in meta["output_token_logprobs"]] == answer["output_ids"]
    assert all(entry[0] <= 0 and entry[2] is None for entry in meta["output_token_logprobs"])
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 8}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (4, 8, 0)
    assert meta["weight_version"] == "default"
    assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 8}]
    assert isinstance(answer["text"], str)


async def test_a_sampling_seed_decides(client):
    params = {"max_new_tokens": 20, "sampling_seed": 7}
    first, second = [await client.generate(sampling_params=params, return_logprob=True) for _ in range(2)]
    other = await client.generate(sampling_params={**params, "sampling_seed": 8})
    assert first["meta_info"]["output_token_logprobs"] == second["meta_info"]["output_token_logprobs"]
    assert other["output_ids"] != first["output_ids"]


async def test_several_choices_share_the_prompt(client):
    params = {"max_new_tokens": 12, "n": 3, "sampling_seed": 1}
    answers = await client.generate(sampling_params=params, rid="r")
    assert [answer["meta_info"]["id"] for answer in answers] == ["r_0", "r_1", "r_2"]
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 3
    assert [answer["meta_info"]["cached_tokens"] for answer in answers] == [0, 4, 4]
    alone = await client.generate(sampling_params={**params, "n": 1})
    assert alone["output_ids"] == answers[0]["output_ids"]


async def test_stop_token_ids_hold_with_ignore_eos(client):
    tokens = (await client.generate())["output_ids"]
    answer = await client.generate(sampling_params={**GREEDY, "stop_token_ids": [tokens[3]]})
    assert answer["output_ids"] == tokens[: tokens.index(tokens[3]) + 1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": tokens[3]}


async def test_scoring_a_prompt(client):
    tokens = (await client.generate(return_logprob=True))["meta_info"]["output_token_logprobs"]
    prompt = PROMPT + [entry[1] for entry in tokens]
    answer = await client.generate(
        input_ids=prompt, sampling_params={"max_new_tokens": 0}, return_logprob=True, logprob_start_len=3
    )
    scored = answer["meta_info"]["input_token_logprobs"]
    assert answer["output_ids"] == []
    assert scored[0] == [None, prompt[3], None]
    assert scored[1:] == tokens


async def test_most_probable_tokens(client):
    answer = await client.generate(return_logprob=True, logprob_start_len=0, top_logprobs_num=2)
    meta = answer["meta_info"]
    assert [top[0] for top in meta["output_top_logprobs"]] == meta["output_token_logprobs"]
    assert meta["input_top_logprobs"][0] is None
    assert [len(top) for top in meta["input_top_logprobs"][1:]] == [2, 2, 2]


async def test_streaming_tells_every_token(client):
    body = {"input_ids": PROMPT, "sampling_params": GREEDY, "stream": True, "return_logprob": True}
    async with client.session.post(f"{client.url}/generate", json=body) as response:
        assert response.content_type == "text/event-stream"
        lines = [line.removeprefix("data: ") for line in (await response.text()).split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    assert [len(event["output_ids"]) for event in events] == list(range(1, 9))
    assert [event["meta_info"]["finish_reason"] for event in events[:-1]] == [None] * 7
    whole = await client.generate(return_logprob=True)
    assert events[-1]["output_ids"] == whole["output_ids"]
    assert events[-1]["meta_info"]["output_token_logprobs"] == whole["meta_info"]["output_token_logprobs"]


async def test_many_requests_at_once_each_get_their_own(client):
    def body(number):
        return {"sampling_params": {"max_new_tokens": 5 + number % 30, "sampling_seed": number}, "rid": str(number)}

    answers = await asyncio.gather(*(client.generate(**body(number)) for number in range(120)))
    for number, answer in enumerate(answers):
        assert answer["meta_info"]["id"] == str(number)
        assert answer["meta_info"]["completion_tokens"] <= 5 + number % 30
    alone = await client.generate(**body(77))
    assert alone["output_ids"] == answers[77]["output_ids"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input_ids": []}, "the prompt is empty"),
        ({"input_ids": [331]}, "input_ids must be in [0, 331)"),
        ({"input_ids": [-1]}, "input_ids must be in"),
        (
            {"input_ids": [1] * 1000, "sampling_params": {"max_new_tokens": 25}},
            "make 1025; the model's context is 1024",
        ),
        ({"input_ids": [1], "sampling_params": {"stop_token_ids": [331]}}, "stop_token_ids must be in"),
        ({"input_ids": [1], "return_logprob": True, "logprob_start_len": 2}, "logprob_start_len is 2"),
        ({"input_ids": [1], "sampling_params": {"regex": "a"}}, "does not support regex"),
        ({"input_ids": [1], "stream": True, "sampling_params": {"top_p": 7}}, "top_p is 7"),
        ({"input_ids": [-1], "stream": True}, "input_ids must be in"),
        ({"input_ids": [1], "return_routed_experts": True}, "start it with --enable-return-routed-experts"),
    ],
)
async def test_requests_that_cannot_be_served(client, body, message):
    status, answer = await client.post("/generate", body)
    assert status == 400
    assert message in answer["error"]["message"]


async def test_a_body_that_is_not_json(client):
    async with client.session.post(f"{client.url}/generate", data=b"{") as response:
        assert response.status == 400
        assert "not JSON" in (await response.json())["error"]["message"]


async def test_too_long_for_the_memory(checkpoint_with_tokenizer):
    engine = Engine(EngineOptions(str(checkpoint_with_tokenizer), kv_bytes=300 * 512), lambda: None)
    item = parse_generate({"input_ids": [1] * 200, "sampling_params": {"max_new_tokens": 100}}).items[0]
    with pytest.raises(BadRequest, match="300 tokens do not fit"):
        engine.prepare(item, lambda _: None)


# -- ending early --------------------------------------------------------------------------------------------------


async def test_abort_by_name_returns_what_there_is(client, served):
    task = client.start(sampling_params=LONG, rid="abc", return_logprob=True)
    other = client.start(sampling_params={**LONG, "max_new_tokens": 60}, rid="other")
    await until(lambda: made(served) > 20)
    assert (await client.ok("/abort_request", {"rid": "abc"}))["success"]
    answer = await task
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(answer["output_ids"]) < 900
    assert len(answer["meta_info"]["output_token_logprobs"]) == len(answer["output_ids"])
    assert len((await other)["output_ids"]) == 60


async def test_abort_all_reaches_those_that_wait(client, served):
    tasks = [client.start(sampling_params=LONG) for _ in range(40)]
    await until(lambda: len(served.engine.scheduler.waiting) == 8)
    await client.ok("/abort_request", {"abort_all": True})
    answers = await asyncio.gather(*tasks)
    assert {answer["meta_info"]["finish_reason"]["type"] for answer in answers} == {"abort"}
    assert sum(not answer["output_ids"] for answer in answers) == 8


async def test_abort_needs_to_know_what(client):
    status, answer = await client.post("/abort_request", {})
    assert (status, answer["error"]["message"]) == (400, "give a rid, or abort_all")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_request(client, served, stream):
    task = client.start(sampling_params=LONG, stream=stream)
    await until(lambda: made(served) > 3)
    task.cancel()
    await until(lambda: not served.engine.scheduler.running())
    assert made(served) < 900


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_pausing_and_going_on(client, served, mode):
    expected = (await client.generate(sampling_params={**GREEDY, "max_new_tokens": 300}))["output_ids"]
    start = made(served)
    task = client.start(sampling_params={**GREEDY, "max_new_tokens": 300})
    await until(lambda: made(served) > start + 5)
    assert (await client.ok("/pause_generation", {"mode": mode}))["status"] == "ok"
    count = made(served)
    assert (await client.get("/health_generate"))[0] == 200
    assert made(served) == count
    assert (await client.post("/flush_cache"))[0] == (200 if mode == "retract" else 400)
    await client.ok("/continue_generation")
    assert (await task)["output_ids"] == expected


async def test_pausing_by_aborting(client, served):
    task = client.start(sampling_params=LONG)
    await until(lambda: made(served) > 5)
    await client.ok("/pause_generation", {})
    assert (await task)["meta_info"]["finish_reason"]["type"] == "abort"
    waiting = client.start()
    await client.ok("/continue_generation")
    assert len((await waiting)["output_ids"]) == 8


async def test_an_unknown_way_to_pause(client):
    status, answer = await client.post("/pause_generation", {"mode": "gently"})
    assert status == 400
    assert "one of abort, retract, in_place" in answer["error"]["message"]


# -- weights -------------------------------------------------------------------------------------------------------


def bucket(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    (whole,) = buckets(tensors.items(), 1 << 40)
    layout = RingLayout(1, whole.nbytes)
    path.write_bytes(bytes(layout.num_bytes))
    memory = torch.from_file(str(path), shared=True, size=layout.num_bytes, dtype=torch.uint8)
    writer = RingWriter(memory, layout, check=lambda: None)
    for slot, tensor in zip(whole.slots, tensors.values(), strict=True):
        writer.write(slot.offset, tensor)
    described = {"path": str(path), "num_readers": 1, "ring_bytes": layout.ring_bytes, "reader": 0}
    return {"load_format": "miles_shm", "bucket": {**described, "tensors": [slot.to_json() for slot in whole.slots]}}


def other_weights(served: Served) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    weights = served.engine.model.weights
    return {
        name: weights.read(name) + 0.1 * torch.randn(weights.read(name).shape, generator=generator)
        for name in weights.names()
    }


async def test_new_weights_without_a_restart(client, served, tmp_path):
    before = await client.generate()
    original = {name: served.engine.model.weights.read(name).clone() for name in served.engine.model.weights.names()}
    new = other_weights(served)
    update = bucket(tmp_path / "bucket", new)
    await client.ok("/pause_generation", {"mode": "retract"})
    assert (await client.ok("/begin_weight_update"))["success"]
    answer = await client.ok("/update_weights_from_tensor", {**update, "weight_version": "7", "flush_cache": False})
    assert answer["success"]
    assert answer["checksums"] == {
        name: xxhash.xxh3_64_hexdigest(tensor.numpy().tobytes()) for name, tensor in new.items()
    }
    assert (await client.ok("/end_weight_update"))["success"]
    await client.ok("/continue_generation")
    after = await client.generate()
    assert after["output_ids"] != before["output_ids"]
    assert after["meta_info"]["weight_version"] == "7"
    assert (await client.get("/model_info"))[1]["weight_version"] == "7"
    report = await client.ok("/weights_checker", {"action": "checksum"})
    assert report["ranks"][0]["checksums"] == answer["checksums"]
    await client.ok("/update_weights_from_disk", {"model_path": str(served.path), "weight_version": "8"})
    again = await client.generate()
    assert (again["output_ids"], again["meta_info"]["weight_version"]) == (before["output_ids"], "8")
    assert all(torch.equal(served.engine.model.weights.read(name), tensor) for name, tensor in original.items())


async def test_requests_in_flight_survive_an_update(client, served, tmp_path):
    update = bucket(tmp_path / "bucket", other_weights(served))
    tasks = [client.start(sampling_params={**GREEDY, "max_new_tokens": 200}, return_logprob=True) for _ in range(5)]
    await until(lambda: made(served) > 100)
    await client.ok("/pause_generation", {"mode": "retract"})
    await client.ok("/begin_weight_update")
    await client.ok("/update_weights_from_tensor", {**update, "weight_version": "1"})
    await client.ok("/end_weight_update")
    await client.ok("/continue_generation")
    for answer in await asyncio.gather(*tasks):
        old, new = answer["meta_info"]["weight_versions"]
        assert (old["version"], old["start"], new["version"], new["end"]) == ("default", 0, "1", 200)
        assert 0 < old["end"] == new["start"] < 200
        assert answer["meta_info"]["num_retractions"] == 1


async def test_an_update_outside_a_session_is_refused(client, served, tmp_path):
    update = bucket(tmp_path / "bucket", other_weights(served))
    status, answer = await client.post("/update_weights_from_tensor", update)
    assert (status, answer["success"]) == (400, False)
    assert "call /begin_weight_update first" in answer["message"]
    assert (await client.post("/end_weight_update"))[0] == 400
    await client.ok("/begin_weight_update")
    assert (await client.post("/begin_weight_update"))[0] == 400


async def test_a_failed_update_says_why_and_changes_nothing(client, served, tmp_path):
    before = await client.generate()
    await client.ok("/begin_weight_update")
    update = bucket(tmp_path / "bucket", {"model.norm.weight": torch.zeros(48), "nobody": torch.zeros(2)})
    status, answer = await client.post("/update_weights_from_tensor", {**update, "weight_version": "9"})
    assert (status, answer) == (400, {"success": False, "message": "this model has no nobody"})
    status, answer = await client.post("/update_weights_from_tensor", {"load_format": "flattened_bucket"})
    assert status == 400
    assert "takes 'miles_shm'" in answer["error"]["message"]
    await client.ok("/end_weight_update")
    after = await client.generate()
    assert (after["output_ids"], after["meta_info"]["weight_version"]) == (before["output_ids"], "default")


async def test_a_missing_directory_is_named(client):
    status, answer = await client.post("/update_weights_from_disk", {"model_path": "/nowhere"})
    assert (status, answer["success"]) == (400, False)
    assert "/nowhere holds no *.safetensors" in answer["message"]


async def test_the_version_alone_can_change(client, served):
    task = client.start(sampling_params=LONG)
    await until(lambda: made(served) > 5)
    await client.ok("/update_weight_version", {"new_version": "4", "abort_all_requests": False})
    assert len(served.engine.scheduler.running()) == 1
    await client.ok("/update_weight_version", {"new_version": "5"})
    answer = await task
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert answer["meta_info"]["weight_versions"][0]["version"] == "default"
    assert (await client.get("/model_info"))[1]["weight_version"] == "5"


async def test_changes_of_another_version_are_refused(client, tmp_path):
    update = bucket(tmp_path / "bucket", {"model.norm.weight": torch.zeros(48)})
    await client.ok("/begin_weight_update")
    status, answer = await client.post(
        "/update_weights_from_tensor", {**update, "delta": {"base_version": "6", "tensors": {}}}
    )
    assert (status, answer["message"]) == (400, "these are changes of version 6; default is held")
    status, answer = await client.post("/update_weights_from_tensor", {**update, "delta": {"base": 1}})
    assert status == 400
    await client.ok("/end_weight_update")


async def test_a_group_that_does_not_exist_is_named(client):
    await client.ok("/begin_weight_update")
    tensor = {"names": ["model.norm.weight"], "dtypes": ["float32"], "shapes": [[48]], "group_name": "g"}
    status, answer = await client.post("/update_weights_from_distributed", tensor)
    assert (status, answer["success"]) == (400, False)
    assert "there is no group 'g'" in answer["message"]
    status, answer = await client.post("/update_weights_from_distributed", {**tensor, "names": ["nobody"]})
    assert "this model has no nobody" in answer["message"]
    await client.ok("/end_weight_update")
    assert (await client.post("/destroy_weights_update_group", {"group_name": "g"}))[0] == 400
    group = {"master_address": "127.0.0.1", "master_port": 9, "rank_offset": 1, "world_size": 2, "group_name": "g"}
    status, answer = await client.post("/init_weights_update_group", {**group, "backend": "nccl"})
    assert "takes 'gloo'" in answer["error"]["message"]
    assert (await client.post("/init_weights_update_group", {"world_size": 2}))[0] == 400


async def test_weights_by_name(client, served):
    held = served.engine.model.weights.read("model.norm.weight")
    assert (
        await client.ok("/get_weights_by_name", {"name": "model.norm.weight", "truncate_size": 3}) == held[:3].tolist()
    )
    status, answer = await client.post("/get_weights_by_name", {"name": "nothing"})
    assert status == 400
    assert "no tensor 'nothing'" in answer["error"]["message"]


# -- the rest ------------------------------------------------------------------------------------------------------


async def test_health(client):
    assert (await client.get("/health"))[0] == 200
    assert (await client.get("/health_generate"))[0] == 200


async def test_an_engine_that_failed_says_so(client, served, monkeypatch):
    def broken(_plan):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(served.engine.model, "forward", broken)
    task = asyncio.create_task(client.post("/generate", {"input_ids": [1], "sampling_params": GREEDY}))
    await until(served.failed.is_set)
    status, answer = await client.get("/health")
    assert status == 503
    assert "out of luck" in answer["error"]["message"]
    assert (await client.get("/health_generate"))[0] == 503
    task.cancel()


async def test_facts(client, served):
    await client.generate()
    info = (await client.get("/model_info"))[1]
    assert (info["model_type"], info["vocab_size"], info["is_generation"]) == ("qwen3", 331, True)
    facts = (await client.get("/server_info"))[1]
    assert (facts["engine"], facts["layer"], facts["context_length"]) == ("miles-embedded", "fast", 1024)
    assert facts["batch_invariant"] is True
    assert facts["generated_tokens"] == 8
    models = (await client.get("/v1/models"))[1]
    assert models["data"][0]["id"] == str(served.path)
    metrics = (await client.get("/metrics"))[1]
    assert f'sglang:generation_tokens_total{{model_name="{served.path}"}} 8' in metrics.splitlines()


async def test_memory_of_the_cache_is_given_back_and_nothing_is_generated_meanwhile(client, served):
    before = (await client.generate())["output_ids"]
    assert served.engine.scheduler.kv.allocated_tokens > 0
    freed = (await client.ok("/release_memory_occupation", {"tags": ["kv_cache"]}))["released_bytes"]
    assert freed > 0
    assert served.engine.scheduler.kv.allocated_tokens == 0
    status, answer = await client.post("/generate", {"input_ids": [1], "sampling_params": GREEDY})
    assert status == 503
    assert "the memory of kv_cache is released" in answer["error"]["message"]
    assert (await client.get("/health_generate"))[0] == 200
    assert (await client.ok("/release_memory_occupation", {"tags": ["kv_cache"]}))["released_bytes"] == 0
    await client.ok("/resume_memory_occupation")
    assert (await client.generate())["output_ids"] == before


async def test_released_weights_have_to_be_sent_again(client, served):
    before = await client.generate()
    weights = served.engine.model.weights
    storage = weights.read("model.norm.weight").untyped_storage()
    freed = (await client.ok("/release_memory_occupation"))["released_bytes"]
    assert freed >= weights.num_bytes
    assert storage.nbytes() == 0
    status, answer = await client.post("/update_weights_from_disk", {"model_path": str(served.path)})
    assert status == 400
    assert "weights is released" in answer["message"]
    await client.ok("/resume_memory_occupation", {"tags": ["weights"]})
    await client.ok("/resume_memory_occupation", {"tags": ["kv_cache", "cuda_graph"]})
    status, answer = await client.post("/generate", {"input_ids": [1], "sampling_params": GREEDY})
    assert status == 503
    assert "tensors were not sent again" in answer["error"]["message"]
    assert (await client.get("/health_generate"))[0] == 200
    assert (await client.get("/model_info"))[1]["weight_version"] == "released"
    await client.ok("/update_weights_from_disk", {"model_path": str(served.path), "weight_version": "default"})
    assert (await client.generate())["output_ids"] == before["output_ids"]


async def test_memory_is_not_released_under_requests(client, served):
    task = asyncio.create_task(client.post("/generate", {"input_ids": [1], "sampling_params": LONG}))
    await until(served.engine.scheduler.running)
    status, answer = await client.post("/release_memory_occupation")
    assert status == 400
    assert "requests are running" in answer["message"]
    await client.ok("/abort_request", {"abort_all": True})
    await task
    status, answer = await client.post("/release_memory_occupation", {"tags": ["disk"]})
    assert status == 400
    assert "cuda_graph, kv_cache, weights" in answer["error"]["message"]


async def test_endpoints_that_are_not_offered_say_what_to_use(client):
    status, answer = await client.post("/v1/completions")
    assert status == 501
    assert "does not offer /v1/completions: use" in answer["error"]["message"]


async def test_an_unknown_endpoint(client):
    assert (await client.get("/nothing"))[0] == 404


# -- chat ----------------------------------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0, "ignore_eos": True}


async def test_chat_is_the_template_and_generate(client, served):
    answer = await client.ok("/v1/chat/completions", {**CHAT, "model": "any", "logprobs": True, "top_logprobs": 2})
    choice = answer["choices"][0]
    prompt = served.engine.text.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    plain = await client.generate(
        input_ids=prompt, sampling_params={**GREEDY, "max_new_tokens": 6}, return_logprob=True
    )
    assert choice["message"]["content"] == plain["text"]
    assert choice["meta_info"]["output_ids"] == plain["output_ids"]
    assert choice["finish_reason"] == "length"
    assert [entry["logprob"] for entry in choice["logprobs"]["content"]] == [
        entry[0] for entry in plain["meta_info"]["output_token_logprobs"]
    ]
    assert [len(entry["top_logprobs"]) for entry in choice["logprobs"]["content"]] == [2] * 6
    assert answer["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 6, "total_tokens": len(prompt) + 6}


async def test_chat_in_a_stream_adds_up(client):
    whole = await client.ok("/v1/chat/completions", {**CHAT, "max_tokens": 30})
    async with client.session.post(
        f"{client.url}/v1/chat/completions", json={**CHAT, "max_tokens": 30, "stream": True}
    ) as response:
        lines = [line.removeprefix("data: ") for line in (await response.text()).split("\n\n") if line]
    chunks = [json.loads(line) for line in lines[:-1]]
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, "length"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages must be"),
        ({"response_format": {"type": "json_object"}}, "does not support response_format"),
        ({"tool_choice": "required"}, "does not support tool_choice"),
        ({"logit_bias": {}}, "does not support logit_bias"),
        ({"temperature": -1}, "temperature is -1"),
    ],
)
async def test_chats_that_are_refused(client, change, message):
    status, answer = await client.post("/v1/chat/completions", {**CHAT, **change})
    assert status == 400
    assert message in answer["error"]["message"]

"""What every engine answers to ``/generate`` and to questions about itself."""

from __future__ import annotations

import asyncio
import base64

import numpy as np
import pytest
import torch
from engine_client import GREEDY, PROMPT

LONG = {"max_new_tokens": 900, "ignore_eos": True}


def log_probs(model, tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    """[T - 1, V]: of each next token."""
    with torch.no_grad():
        return (model(torch.tensor([tokens])).logits[0, :-1].float() / temperature).log_softmax(-1)


def scores(answer) -> list[tuple[float, int]]:
    return [(entry[0], entry[1]) for entry in answer["meta_info"]["output_token_logprobs"]]


# -- what is made ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_log_probs_are_the_models(client, reference, temperature):
    params = {"max_new_tokens": 20, "temperature": temperature, "sampling_seed": 3, "ignore_eos": True}
    answer = await client.generate(sampling_params=params, return_logprob=True)
    tokens = PROMPT + answer["output_ids"]
    expected = log_probs(reference, tokens, temperature)[len(PROMPT) - 1 :]
    for (got, token), row in zip(scores(answer), expected, strict=True):
        assert got == pytest.approx(row[token].item(), abs=2e-5)


async def test_facts_beside_the_tokens(client):
    answer = await client.generate(return_logprob=True, rid="mine")
    meta = answer["meta_info"]
    assert len(answer["output_ids"]) == 8
    assert [token for _, token in scores(answer)] == answer["output_ids"]
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 8}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (4, 8)
    assert isinstance(meta["cached_tokens"], int)
    assert meta["weight_versions"] == [{"version": meta["weight_version"], "start": 0, "end": 8}]
    assert isinstance(answer["text"], str)


async def test_log_probs_only_when_wanted(client):
    assert "output_token_logprobs" not in (await client.generate())["meta_info"]


async def test_text_in_is_tokens_in(client):
    by_text = await client.ok("/generate", {"text": "12+7=", "sampling_params": GREEDY})
    by_ids = await client.generate(input_ids=[ord(char) - ord("!") for char in "12+7="])
    assert by_text["meta_info"]["prompt_tokens"] == 5
    assert by_text["output_ids"] == by_ids["output_ids"]


async def test_a_sampling_seed_decides(client):
    params = {"max_new_tokens": 20, "sampling_seed": 7, "ignore_eos": True}
    first, second = [await client.generate(sampling_params=params) for _ in range(2)]
    other = await client.generate(sampling_params={**params, "sampling_seed": 8})
    assert first["output_ids"] == second["output_ids"]
    assert other["output_ids"] != first["output_ids"]


async def test_without_a_seed_every_request_differs(client):
    params = {"max_new_tokens": 20, "ignore_eos": True}
    answers = [await client.generate(sampling_params=params) for _ in range(2)]
    answers += await client.generate(sampling_params={**params, "n": 3})
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 5


@pytest.mark.parametrize("truncation", [{"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.5}, {"top_k": 40, "top_p": 0.5}])
async def test_truncated_support_is_never_left(client, reference, truncation):
    params = {"max_new_tokens": 30, "sampling_seed": 5, "ignore_eos": True, **truncation}
    answer = await client.generate(sampling_params=params, return_logprob=True)
    tokens = PROMPT + answer["output_ids"]
    for token, row in zip(answer["output_ids"], log_probs(reference, tokens)[len(PROMPT) - 1 :].exp(), strict=True):
        more = row[row > row[token] + 1e-4]
        assert len(more) < truncation.get("top_k", len(row))
        assert more.sum() <= truncation.get("top_p", 1.0) + 1e-3
        assert row[token] >= truncation.get("min_p", 0.0) * row.max() - 1e-3
    assert scores(answer)[0][0] == pytest.approx(
        log_probs(reference, tokens)[len(PROMPT) - 1, answer["output_ids"][0]].item(), abs=2e-5
    ), "log-probabilities are of the whole distribution"


async def test_a_batch_answers_in_order_and_each_by_its_own_parameters(client):
    params = [{**GREEDY, "max_new_tokens": 3}, GREEDY]
    answers = await client.generate(input_ids=[PROMPT, [9, 10]], sampling_params=params, return_logprob=True)
    assert [answer["meta_info"]["prompt_tokens"] for answer in answers] == [4, 2]
    assert [len(answer["output_ids"]) for answer in answers] == [3, 8]
    assert answers[1]["output_ids"] == (await client.generate(input_ids=[9, 10]))["output_ids"]


async def test_stop_token_ids_end_a_response(client):
    tokens = (await client.generate())["output_ids"]
    params = {"max_new_tokens": 8, "temperature": 0.0, "stop_token_ids": [tokens[3]]}
    answer = await client.generate(sampling_params=params)
    assert answer["output_ids"] == tokens[: tokens.index(tokens[3]) + 1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": tokens[3]}


async def test_stop_strings_are_cut_from_the_text_unless_it_says_otherwise(client):
    params = {**GREEDY, "max_new_tokens": 40}
    whole = await client.generate(sampling_params=params)
    stop = whole["text"][9:11]
    cut = await client.generate(sampling_params={**params, "stop": [stop, "never there"]})
    kept = await client.generate(sampling_params={**params, "stop": stop, "no_stop_trim": True})
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert kept["text"].endswith(stop)
    assert cut["output_ids"] == kept["output_ids"] == whole["output_ids"][: len(cut["output_ids"])]


async def test_scoring_a_prompt(client):
    made = scores(await client.generate(return_logprob=True))
    prompt = PROMPT + [token for _, token in made]
    answer = await client.generate(
        input_ids=prompt, sampling_params={"max_new_tokens": 0}, return_logprob=True, logprob_start_len=3
    )
    scored = answer["meta_info"]["input_token_logprobs"]
    assert scored[0][:2] == [None, prompt[3]]
    assert [entry[1] for entry in scored[1:]] == prompt[4:]
    assert [entry[0] for entry in scored[1:]] == pytest.approx([score for score, _ in made], abs=2e-5)


async def test_most_probable_tokens(client):
    answer = await client.generate(return_logprob=True, top_logprobs_num=2)
    for (score, token), top in zip(scores(answer), answer["meta_info"]["output_top_logprobs"], strict=True):
        assert len(top) == 2
        assert top[0][1] == token
        assert top[0][0] == pytest.approx(score, abs=1e-6)


async def test_streaming_grows_to_the_whole_answer(client):
    body = {"input_ids": PROMPT, "sampling_params": GREEDY, "return_logprob": True}
    events = [event async for event in client.events("/generate", body)]
    assert [event["meta_info"]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert len(events) > 1
    whole = await client.generate(return_logprob=True)
    assert events[-1]["text"] == whole["text"]
    assert events[-1]["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]
    assert events[-1]["meta_info"]["completion_tokens"] == 8


async def test_many_requests_at_once_each_get_their_own(client):
    def body(number):
        params = {"max_new_tokens": 5 + number % 30, "sampling_seed": number, "ignore_eos": True}
        return {"sampling_params": params, "rid": f"many-{number}"}

    answers = await asyncio.gather(*(client.generate(**body(number)) for number in range(80)))
    for number, answer in enumerate(answers):
        assert answer["meta_info"]["id"] == f"many-{number}"
        assert answer["meta_info"]["completion_tokens"] == 5 + number % 30


async def test_routed_experts_are_the_models(client, reference):
    answer = await client.generate(return_logprob=True, return_routed_experts=True)
    tokens = PROMPT + answer["output_ids"]
    raw = np.frombuffer(base64.b64decode(answer["meta_info"]["routed_experts"]), dtype="<i4")
    experts = raw.reshape(-1, 2, 2)[: len(tokens) - 1]
    with torch.no_grad():
        routers = reference(torch.tensor([tokens[:-1]]), output_router_logits=True).router_logits
    for layer, logits in enumerate(routers):
        expected = logits.view(len(tokens) - 1, -1).topk(2).indices.sort(-1).values
        assert np.array_equal(np.sort(experts[:, layer], -1), expected.numpy())


# -- ending early ----------------------------------------------------------------------------------------------------


async def under_way(client, **body):
    """A request that has made some tokens, as a task of its events."""
    started = asyncio.Event()

    async def follow():
        last = None
        async for last in client.events("/generate", {"input_ids": PROMPT, "sampling_params": LONG, **body}):
            if last["meta_info"]["completion_tokens"] > 3:
                started.set()
        return last

    task = asyncio.create_task(follow())
    async with asyncio.timeout(30):
        await started.wait()
    return task


async def test_abort_by_name_returns_what_there_is(client):
    task = await under_way(client, rid="abc", return_logprob=True)
    other = client.start(sampling_params={**LONG, "max_new_tokens": 60}, rid="other")
    await client.ok("/abort_request", {"rid": "abc"})
    meta = (await task)["meta_info"]
    assert meta["finish_reason"]["type"] == "abort"
    assert 0 < meta["completion_tokens"] < 900
    assert len((await other)["output_ids"]) == 60


async def test_abort_of_all(client):
    running = await under_way(client)
    tasks = [client.start(sampling_params=LONG, return_logprob=True) for _ in range(3)]
    await asyncio.sleep(0)
    await client.ok("/abort_request", {"abort_all": True})
    assert (await running)["meta_info"]["finish_reason"]["type"] == "abort"
    while not all(task.done() for task in tasks):  # a request may arrive after the order
        await client.ok("/abort_request", {"abort_all": True})
        await asyncio.wait(tasks, timeout=0.2)
    for answer in [task.result() for task in tasks]:
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        assert len(answer["meta_info"]["output_token_logprobs"]) == len(answer["output_ids"])


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_pausing_and_going_on_changes_nothing(client, mode):
    params = {**GREEDY, "max_new_tokens": 200}
    expected = await client.generate(sampling_params=params)
    task = await under_way(client, sampling_params=params)
    await client.ok("/pause_generation", {"mode": mode})
    await client.ok("/continue_generation")
    assert (await task)["text"] == expected["text"]


async def test_pausing_by_aborting(client):
    task = await under_way(client)
    await client.ok("/pause_generation", {"mode": "abort"})
    await client.ok("/continue_generation")
    assert (await task)["meta_info"]["finish_reason"]["type"] == "abort"
    assert len((await client.generate())["output_ids"]) == 8


# -- what is refused, and facts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"input_ids": [1] * 1100},
        {"input_ids": [1], "sampling_params": {"top_p": 7}},
        {"input_ids": [1], "sampling_params": {"temperature": -1}},
        {},
    ],
)
async def test_requests_that_cannot_be_served_are_answered_4xx_with_a_reason(client, body):
    status, answer = await client.post("/generate", body)
    assert 400 <= status < 500
    assert answer["error"]["message"]
    assert len((await client.generate())["output_ids"]) == 8, "the engine goes on"


async def test_a_body_that_is_not_json(client):
    async with client.session.post(f"{client.url}/generate", data=b"{") as response:
        assert 400 <= response.status < 500


async def test_an_unknown_endpoint(client):
    assert (await client.get("/nothing"))[0] == 404


async def test_health_and_facts(client, served):
    assert (await client.get("/health"))[0] == 200
    assert (await client.get("/health_generate"))[0] == 200
    info = (await client.get("/model_info"))[1]
    assert info["model_path"] == str(served.path)
    assert info["is_generation"] is True
    assert isinstance(info["weight_version"], str)
    assert (await client.get("/server_info"))[0] == 200
    assert (await client.get("/v1/models"))[1]["data"][0]["id"] == str(served.path)


# -- chat ------------------------------------------------------------------------------------------------------------

CHAT = {"model": "any", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0}


async def test_chat_is_the_template_and_generate(client):
    answer = await client.ok("/v1/chat/completions", {**CHAT, "ignore_eos": True, "logprobs": True, "top_logprobs": 2})
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    params = {**GREEDY, "max_new_tokens": 6}
    plain = await client.ok("/generate", {"text": prompt, "sampling_params": params, "return_logprob": True})
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == plain["text"]
    assert choice["finish_reason"] == "length"
    told = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    assert told == pytest.approx([score for score, _ in scores(plain)], abs=2e-5)
    assert [len(entry["top_logprobs"]) for entry in choice["logprobs"]["content"]] == [2] * 6
    tokens = plain["meta_info"]["prompt_tokens"]
    usage = {name: answer["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    assert usage == {"prompt_tokens": tokens, "completion_tokens": 6, "total_tokens": tokens + 6}


async def test_chat_in_a_stream_adds_up(client):
    body = {**CHAT, "max_tokens": 30, "ignore_eos": True}
    whole = await client.ok("/v1/chat/completions", body)
    chunks = [chunk async for chunk in client.events("/v1/chat/completions", body)]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert deltas[0]["role"] == "assistant"
    assert "length" in [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]]


@pytest.mark.parametrize("change", [{"messages": []}, {"temperature": -1}])
async def test_chats_that_are_refused(client, change):
    status, answer = await client.post("/v1/chat/completions", {**CHAT, **change})
    assert 400 <= status < 500
    assert "message" in str(answer)

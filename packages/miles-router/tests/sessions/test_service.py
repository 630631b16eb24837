"""Sessions over real sockets: what agents see, what engines see, what is recorded."""

from __future__ import annotations

import asyncio
import base64
import json
from array import array

import pytest

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def user(text):
    return {"role": "user", "content": text}


async def test_agent_gets_an_openai_answer(make_stage):
    stage = await make_stage("the answer")
    agent = await stage.agent()
    answer = await agent.chat(user("hi"), model="m", max_tokens=9, temperature=0.5, seed=4)
    body = answer.json()
    assert answer.status == 200
    assert body["object"] == "chat.completion"
    assert body["model"] == "m"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "the answer"}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
    sent = stage.speaker.bodies[0]
    assert sent["sampling_params"] == {"max_new_tokens": 9, "temperature": 0.5, "sampling_seed": 4}
    assert sent["return_logprob"] is True
    assert sent["rid"]
    assert stage.worker.requests[0].header("x-smg-routing-key") == agent.identity


async def test_second_turn_sends_the_first_ones_tokens_untouched(make_stage):
    stage = await make_stage("the answer", "more")
    agent = await stage.agent()
    first = await agent.say(user("hi"))
    await agent.say(user("hi"), first, user("and?"))
    one, two = stage.speaker.prompts
    encode = stage.speaker.tokenizer.encode
    assert two == one + encode("the answer<|im_end|>") + encode(
        "\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_samples_train_on_sampled_tokens_only(make_stage):
    stage = await make_stage("the answer", "more")
    agent = await stage.agent()
    first = await agent.say(user("hi"))
    await agent.say(user("hi"), first, user("and?"))
    (sample,) = await agent.samples()
    one, two = stage.speaker.prompts
    outputs = [stage.speaker.tokenizer.encode(text + "<|im_end|>") for text in ("the answer", "more")]
    assert sample["tokens"] == two + outputs[1]
    between = len(two) - len(one) - len(outputs[0])
    assert sample["loss_mask"] == [1] * len(outputs[0]) + [0] * between + [1] * len(outputs[1])
    assert len(sample["rollout_log_probs"]) == sample["response_length"] == len(sample["loss_mask"])
    for mask, logp in zip(sample["loss_mask"], sample["rollout_log_probs"]):
        assert (logp != 0.0) == bool(mask)
    assert sample["status"] == "completed"
    assert sample["weight_versions"] == ["3", "3"]
    assert sample["token_weight_versions"] == [3] * sample["response_length"]


async def test_tool_calls_go_out_and_come_back(make_stage):
    said = 'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    stage = await make_stage(said, "it is 3")
    agent = await stage.agent()
    first = await agent.say(user("1 + 2?"), tools=[TOOL])
    assert first["content"] == "I add."
    (call,) = first["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "3"}
    last = await agent.say(user("1 + 2?"), first, result, tools=[TOOL])
    assert last["content"] == "it is 3"
    one, two = stage.speaker.prompts
    encode = stage.speaker.tokenizer.encode
    assert two[len(one) :] == encode(said + "<|im_end|>") + encode(
        "\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    shown = await agent.show()
    assert shown["metadata"]["tito_session_mismatch"] == dict.fromkeys(
        ("special_token_count", "special_token_type", "non_assistant_text", "assistant_text"), 0
    )
    assert shown["metadata"]["accumulated_token_ids"][: len(two)] == two
    assert [record["finish_reason"] for record in shown["records"]] == ["stop", "stop"]


async def test_retry_takes_the_last_turn_back(make_stage):
    stage = await make_stage("bad", "good", "more")
    agent = await stage.agent()
    await agent.say(user("hi"))
    first = await agent.say(user("hi"))
    assert stage.speaker.prompts[0] == stage.speaker.prompts[1]
    await agent.say(user("hi"), first, user("and?"))
    (sample,) = await agent.samples()
    assert "good" in sample["response"]
    assert "bad" not in sample["response"]
    shown = await agent.show()
    assert shown["metadata"]["num_rollbacks"] == 1
    assert len(shown["records"]) == 2


async def test_messages_that_do_not_continue_the_session_are_refused(make_stage):
    stage = await make_stage()
    agent = await stage.agent()
    first = await agent.say(user("hi"))
    second = await agent.say(user("hi"), first, user("b"))
    await agent.say(user("hi"), first, user("b"), second, user("c"))
    answer = await agent.chat(user("other"))
    assert answer.status == 400
    assert answer.json()["error"]["code"] == 400
    assert "continue 0 of the session's 3 turns" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b"[]", 400), (b"", 400), (b'{"messages": [], "n": 2}', 400), (b'"' + b"x" * 3000 + b'"', 413)],
)
async def test_bad_bodies_are_refused(make_stage, body, status):
    stage = await make_stage(max_body_bytes=2000)
    agent = await stage.agent()
    answer = await stage.router.post(f"/sessions/{agent.identity}/v1/chat/completions", body)
    assert answer.status == status
    assert answer.json()["error"]["type"] == "router_error"


async def test_messages_that_the_template_refuses_are_refused(make_stage):
    stage = await make_stage(family="mistral")
    answer = await (await stage.agent()).chat({"role": "system", "content": "x"}, user("hi"))
    assert answer.status == 400
    assert "only user and assistant" in answer.json()["error"]["message"]


async def test_sessions_end(make_stage):
    stage = await make_stage()
    agent = await stage.agent()
    client = await stage.router.connect()
    request = f"DELETE /sessions/{agent.identity} HTTP/1.1\r\nhost: x\r\n\r\n".encode()
    await client.send(request)
    assert (await client.response()).status == 204
    await client.send(request)
    assert (await client.response()).status == 404
    assert (await agent.chat(user("hi"))).status == 404
    assert (await stage.router.get(f"/sessions/{agent.identity}")).status == 404
    assert (await stage.router.post(f"/sessions/{agent.identity}/samples", b"")).status == 404


async def test_no_more_sessions_than_allowed(make_stage):
    stage = await make_stage(max_sessions=1)
    await stage.agent()
    answer = await stage.router.post("/sessions", b"")
    assert answer.status == 503
    assert answer.header("retry-after") == "1"


async def test_streaming_clients_get_events(make_stage):
    stage = await make_stage("the answer")
    agent = await stage.agent()
    answer = await agent.chat(user("hi"), stream=True, stream_options={"include_usage": True})
    assert answer.header("content-type").startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[0])["choices"][0]["delta"]["content"] == "the answer"
    assert json.loads(events[2])["usage"]["completion_tokens"] > 0
    assert len(await agent.samples()) == 1


async def test_logprobs_are_given_when_asked_for(make_stage):
    stage = await make_stage("a")
    answer = await (await stage.agent()).chat(user("hi"), logprobs=True)
    entries = answer.json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == ["a", "<|im_end|>"]


async def test_errors_of_workers_are_passed_on_and_not_recorded(make_stage):
    async def refuse(conversation):
        await conversation.answer(b'{"error": "too long"}', 400, "content-type: application/json")

    stage = await make_stage()
    agent = await stage.agent()
    stage.worker.behaviour = refuse
    answer = await agent.chat(user("hi"))
    assert (answer.status, answer.body) == (400, b'{"error": "too long"}')
    assert await agent.samples() == []
    assert "tito_session_mismatch" not in (await agent.show())["metadata"]


@pytest.mark.parametrize("body", [b"no json", b"{}"])
async def test_answers_without_tokens_are_bad_gateways(make_stage, body):
    async def nonsense(conversation):
        await conversation.answer(body)

    stage = await make_stage()
    stage.worker.behaviour = nonsense
    answer = await (await stage.agent()).chat(user("hi"))
    assert answer.status == 502
    assert "bad answer of a worker" in answer.json()["error"]["message"]


async def test_no_worker_is_told_as_such(make_stage):
    stage = await make_stage(queue_timeout_s=0.2)
    agent = await stage.agent()
    await stage.worker.kill()
    await stage.router.state(stage.worker, "quarantined")
    answer = await agent.chat(user("hi"))
    assert answer.status == 503
    assert answer.header("retry-after") == "1"


async def test_chunked_answers_are_put_together(make_stage):
    stage = await make_stage("well")

    async def chunked(conversation):
        body = json.dumps(stage.speaker.answer(conversation.request.json())).encode()
        await conversation.send(b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n")
        for at in range(0, len(body), 100):
            piece = body[at : at + 100]
            await conversation.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        await conversation.send(b"0\r\n\r\n")

    stage.worker.behaviour = chunked
    assert (await (await stage.agent()).say(user("hi")))["content"] == "well"


async def test_broken_chunked_answer_is_a_bad_gateway(make_stage):
    async def breaks_off(conversation):
        await conversation.send(b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{")
        conversation.reset()

    stage = await make_stage(max_attempts=1)
    stage.worker.behaviour = breaks_off
    answer = await (await stage.agent()).chat(user("hi"))
    assert answer.status == 502
    assert "broke off" in answer.json()["error"]["message"]


def hanging():
    """A behaviour that answers nothing, and the event of its first request."""
    arrived = asyncio.Event()

    async def hang(conversation):
        arrived.set()
        await conversation.client_left()

    return hang, arrived


async def test_agent_that_leaves_aborts_its_generation(make_stage, until):
    stage = await make_stage()
    agent = await stage.agent()
    stage.worker.behaviour, arrived = hanging()
    client = await stage.router.connect()
    body = json.dumps({"messages": [user("hi")], "rid": "mine"}).encode()
    path = f"/sessions/{agent.identity}/v1/chat/completions"
    await client.send(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    await arrived.wait()
    client.reset()
    await until(lambda: stage.worker.aborted == ["mine"])
    await stage.router.settled()


async def test_deleted_session_aborts_its_generation(make_stage, until):
    stage = await make_stage()
    agent = await stage.agent()
    stage.worker.behaviour, arrived = hanging()
    waiting = asyncio.create_task(agent.chat(user("hi")))
    await arrived.wait()
    client = await stage.router.connect()
    await client.send(f"DELETE /sessions/{agent.identity} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    assert (await client.response()).status == 204
    answer = await waiting
    assert answer.status == 404
    assert "was deleted" in answer.json()["error"]["message"]
    await until(lambda: len(stage.worker.aborted) == 1)
    await stage.router.settled()


async def test_first_of_two_answers_is_the_one_recorded(make_stage, until):
    stage = await make_stage("first", "second")
    agent = await stage.agent()
    turn = asyncio.Semaphore(0)
    speak = stage.speaker

    async def in_turn(conversation):
        await turn.acquire()
        await speak(conversation)

    stage.worker.behaviour = in_turn
    one, two = (asyncio.create_task(agent.say(user("hi"))) for _ in range(2))
    await until(lambda: len(stage.worker.requests) == 2)
    turn.release()
    turn.release()
    assert {(await one)["content"], (await two)["content"]} == {"first", "second"}
    shown = await agent.show()
    assert (len(shown["records"]), shown["metadata"]["num_unrecorded"]) == (1, 1)


async def test_other_paths_go_to_a_worker_with_the_session_as_key(make_stage):
    async def echo(conversation):
        await conversation.answer(conversation.request.body)

    stage = await make_stage()
    agent = await stage.agent()
    stage.worker.behaviour = echo
    answer = await stage.router.post(f"/sessions/{agent.identity}/v1/models?x=%20", b"abc", "x-smg-routing-key: other")
    assert answer.body == b"abc"
    (request,) = stage.worker.requests
    assert request.target == "/v1/models?x=%20"
    assert [value for name, value in request.headers if name == "x-smg-routing-key"] == [agent.identity]


async def test_sessions_are_no_way_around_the_token(make_stage, tmp_path):
    token = tmp_path / "token"
    token.write_text("secret")
    stage = await make_stage(control_token_file=token)
    agent = await stage.agent()
    for path in ("flush_cache", "%66lush_cache", "update_weights_from_disk"):
        answer = await stage.router.post(f"/sessions/{agent.identity}/{path}", b"{}")
        assert answer.status == 404
    assert not stage.worker.requests


async def test_samples_are_safetensors_unless_json_is_wanted(make_stage):
    stage = await make_stage("well")
    agent = await stage.agent()
    await agent.say(user("hi"))
    answer = await stage.router.post(f"/sessions/{agent.identity}/samples", b'{"max_seq_len": null}')
    assert answer.header("content-type") == "application/octet-stream"
    size = int.from_bytes(answer.body[:8], "little")
    assert set(json.loads(answer.body[8 : 8 + size])) == {
        "tokens.0", "loss_mask.0", "rollout_log_probs.0", "token_weight_versions.0", "_samples_meta",
    }  # fmt: skip
    (cut,) = await agent.samples(max_seq_len=len(stage.speaker.prompts[0]) + 1)
    assert (cut["response_length"], cut["status"]) == (1, "truncated")


@pytest.mark.parametrize("limit", [0, "x", 1.5, True])
async def test_limits_that_are_no_numbers_of_tokens_are_refused(make_stage, limit):
    stage = await make_stage()
    agent = await stage.agent()
    body = json.dumps({"max_seq_len": limit}).encode()
    answer = await stage.router.post(f"/sessions/{agent.identity}/samples", body)
    assert answer.status == 400
    assert "max_seq_len" in answer.json()["error"]["message"]


async def test_routed_experts_are_asked_for_and_kept_from_the_agent(make_stage):
    stage = await make_stage("well", session_routed_experts=True)
    agent = await stage.agent()
    tokenizer = stage.speaker.tokenizer
    num_rows = len(tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nwell<|im_end|>")) - 1
    stage.speaker.extra = {"routed_experts": base64.b64encode(array("i", range(num_rows * 4)).tobytes()).decode()}
    answer = await agent.chat(user("hi"))
    assert b"routed_experts" not in answer.body
    assert stage.speaker.bodies[0]["return_routed_experts"] is True
    wire = (await stage.router.post(f"/sessions/{agent.identity}/samples", b"")).body
    size = int.from_bytes(wire[:8], "little")
    assert json.loads(wire[8 : 8 + size])["rollout_routed_experts.0"]["shape"] == [num_rows, 4]


async def test_experts_that_do_not_fit_make_no_sample(make_stage):
    stage = await make_stage("well")
    agent = await stage.agent()
    stage.speaker.extra = {"routed_experts": base64.b64encode(array("i", [1, 2, 3]).tobytes()).decode()}
    await agent.say(user("hi"))
    answer = await stage.router.post(f"/sessions/{agent.identity}/samples", b"")
    assert answer.status == 422
    assert "do not divide" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen3", {"assistant_text": 1}),  # the template gives the last turn empty reasoning
        ("llama3", {}),
        ("glm", {"special_token_count": 1}),  # the role that would follow ends the last turn
        ("gemma", {}),
        ("mistral", {}),
    ],
)
async def test_every_family_keeps_the_tokens_it_sampled(make_stage, family, expected):
    stage = await make_stage("one", "two", "three", family=family)
    agent = await stage.agent()
    messages = []
    for question in "abc":
        messages.append(user(question))
        messages.append(await agent.say(*messages))
    ids = (await agent.show())["metadata"]["accumulated_token_ids"]
    for shorter, longer in zip(stage.speaker.prompts, [*stage.speaker.prompts[1:], ids]):
        assert longer[: len(shorter)] == shorter
    mismatch = (await agent.show())["metadata"]["tito_session_mismatch"]
    assert {kind: count for kind, count in mismatch.items() if count} == expected
    (sample,) = await agent.samples()
    assert sum(sample["loss_mask"]) == sum(
        len(stage.speaker.tokenizer.encode(text)) + 1 for text in ("one", "two", "three")
    )

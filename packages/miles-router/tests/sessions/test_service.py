"""Sessions over real sockets: what agents see, what engines see, what is recorded."""

from __future__ import annotations

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

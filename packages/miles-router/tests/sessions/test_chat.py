"""OpenAI's form on one side, the engine's on the other."""

from __future__ import annotations

import json

import pytest

from miles.router.sessions import chat
from miles.router.sessions.speech import Listener
from miles.router.tokenizer import CheckpointTokenizer

USER = {"role": "user", "content": "hi"}


def read(**fields):
    return chat.read_chat({"messages": [USER]} | fields)


def answer(*ids, finish="stop", **meta):
    known = {
        "finish_reason": {"type": finish},
        "output_token_logprobs": [[-1.0, token, None] for token in ids],
    }
    return {"meta_info": known | meta}


def test_parameters_get_the_engines_names():
    request = read(
        max_completion_tokens=5, min_tokens=1, seed=3, temperature=0, stop=["x"], top_k=None, user="me", lora_path="l"
    )
    assert request.sampling == {
        "max_new_tokens": 5, "min_new_tokens": 1, "sampling_seed": 3, "temperature": 0, "stop": ["x"],
    }  # fmt: skip
    payload = request.payload([1, 2], routed_experts=True)
    assert payload == {
        "input_ids": [1, 2], "sampling_params": request.sampling, "return_logprob": True,
        "return_routed_experts": True, "lora_path": "l",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, '{"type": "object"}'),
        ({"type": "json_schema", "json_schema": {"schema": {"a": 1}}}, '{"a": 1}'),
    ],
)
def test_response_format_becomes_a_grammar(given, schema):
    assert read(response_format=given).sampling.get("json_schema") == schema


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"n": 2}, "n is 2"),
        ({"modalities": ["audio"], "audio": {}}, "'audio', 'modalities'"),
        ({"tool_choice": "required"}, "tool_choice 'required'"),
        ({"response_format": {"type": "xml"}}, "expected type text"),
    ],
)
def test_fields_that_cannot_be_served_are_named(fields, problem):
    with pytest.raises(chat.BadRequestError, match=problem):
        read(**fields)


def test_body_must_be_an_object():
    with pytest.raises(chat.BadRequestError, match="JSON object"):
        chat.read_chat([])


def test_tools_are_left_out_when_none_may_be_called():
    assert read(tools=[{}], tool_choice="none").tools is None
    assert read(tools=[{}]).tools == [{}]
    assert read(tools=[]).tools is None


def test_generation_is_read_from_the_answer():
    spans = [{"version": "3", "start": 0, "end": 1}, {"version": 4, "start": 1, "end": 2}]
    generation = chat.read_generation(
        answer(7, 8, weight_versions=spans, completion_tokens=2, cached_tokens=5, routed_experts="AA==")
    )
    assert (generation.output, generation.logps, generation.finish) == ([7, 8], [-1.0, -1.0], "stop")
    assert (generation.versions, generation.token_versions) == (["3", "4"], [3, 4])
    assert (generation.cached_tokens, generation.routed_experts) == (5, "AA==")


@pytest.mark.parametrize(
    ("meta", "versions", "token_versions"),
    [
        ({}, [], None),
        ({"weight_version": "default"}, ["default"], None),
        ({"weight_version": 3}, ["3"], [3, 3]),
        ({"weight_versions": ["3"], "weight_version": "4"}, ["4"], [4, 4]),
        ({"weight_versions": [{"version": "3", "start": 0, "end": 1}]}, ["3"], None),
    ],
)
def test_weight_versions_in_any_form(meta, versions, token_versions):
    generation = chat.read_generation(answer(7, 8, **meta))
    assert (generation.versions, generation.token_versions) == (versions, token_versions)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ([], "no meta_info.output_token_logprobs"),
        ({"meta_info": {}}, "no meta_info.output_token_logprobs"),
        (answer(1, completion_tokens=2), "sampled 2 tokens but names 1"),
        (answer(1, finish="tired"), "finish_reason is 'tired'"),
        ({"meta_info": {"output_token_logprobs": [], "finish_reason": None}}, "finish_reason is None"),
    ],
)
def test_answers_that_lack_something_are_named(given, problem):
    with pytest.raises(chat.BadAnswerError, match=problem):
        chat.read_generation(given)


@pytest.fixture
def reply_to(checkpoint):
    tokenizer = CheckpointTokenizer(checkpoint("chatml"))

    def reply(text, **meta):
        given = answer(*tokenizer.encode(text), **meta)
        listener = Listener("hermes", "", reasoning=True)
        return chat.make_reply(tokenizer, listener, read(tools=[{}]), [], given, chat.read_generation(given))

    return reply


def test_end_token_is_no_word(reply_to):
    assert reply_to("yes<|im_end|>")["content"] == "yes"
    assert reply_to("yes", finish="length")["content"] == "yes"
    assert reply_to("a<|im_end|>b<|im_end|>", finish="length")["content"] == "ab"


def test_stop_string_is_no_word(reply_to):
    assert reply_to("yes STOP", finish_reason={"type": "stop", "matched": "STOP"})["content"] == "yes "
    assert reply_to("yes", finish_reason={"type": "stop", "matched": "STOP"})["content"] == "yes"


def test_token_that_matched_is_no_word(checkpoint, reply_to):
    token = CheckpointTokenizer(checkpoint("chatml")).encode("s")[0]
    assert reply_to("yes", finish_reason={"type": "stop", "matched": token})["content"] in ("ye", "yes")


def test_reasoning_and_calls_have_fields_of_their_own(reply_to):
    reply = reply_to('<think>\nhm</think>ok<tool_call>{"name": "f", "arguments": {}}</tool_call><|im_end|>')
    assert (reply["content"], reply["reasoning_content"]) == ("ok", "hm")
    (call,) = reply["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": {}}
    assert call["id"].startswith("call_")


def complete(reply, finish="stop"):
    generation = chat.read_generation(answer(1, 2, finish=finish))
    return chat.completion(read(model="m"), reply, generation, 3, None)


def test_completion_has_openais_form():
    body = complete({"role": "assistant", "content": "yes", "reasoning_content": "hm"})
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    assert choice["finish_reason"] == "stop"
    assert body["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip


def test_calls_are_text_on_the_wire_and_a_reason_to_finish():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "ä"}}}
    reply = {"role": "assistant", "content": "", "tool_calls": [call]}
    (choice,) = complete(reply)["choices"]
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": "ä"}'
    assert choice["finish_reason"] == "tool_calls"
    assert complete(reply, "length")["choices"][0]["finish_reason"] == "length"


def test_stream_is_one_delta_and_an_end():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    body = complete({"role": "assistant", "content": "x", "tool_calls": [call]})
    *events, done = chat.stream_events(body, include_usage=True)
    assert done == b"data: [DONE]\n\n"
    first, last, usage = (json.loads(event.removeprefix(b"data: ")) for event in events)
    assert first["choices"][0]["delta"]["content"] == "x"
    assert first["choices"][0]["delta"]["tool_calls"][0]["index"] == 0
    assert last["choices"][0]["finish_reason"] == "tool_calls"
    assert (usage["usage"], usage["choices"]) == (body["usage"], [])
    assert len(list(chat.stream_events(body, include_usage=False))) == 3


def test_logprobs_have_openais_form(checkpoint):
    tokenizer = CheckpointTokenizer(checkpoint("chatml"))
    (token,) = tokenizer.encode("a")
    given = answer(token, output_top_logprobs=[[[-1.0, token, None], [-2.0, token, None]]])
    (entry,) = chat.openai_logprobs(tokenizer, given)["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("a", -1.0, [97])
    assert [top["logprob"] for top in entry["top_logprobs"]] == [-1.0, -2.0]
    assert chat.openai_logprobs(tokenizer, answer(token))["content"][0]["top_logprobs"] == []
    assert read(top_logprobs=2).payload([], routed_experts=False)["top_logprobs_num"] == 2

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from rollout_fakes import Payload, answer

from miles.core.errors import EngineError
from miles.core.types.rollout import GenerateFnInput
from miles.core.types.sample import Sample, Status
from miles.rollout.generate_state import GenerateState
from miles.rollout.generators.response import append_response
from miles.rollout.generators.single_turn import SingleTurn
from miles.rollout.text import ChatTokenizer


class Client:
    """Answers like an engine; remembers what it was sent."""

    def __init__(self, **changes: Any) -> None:
        self.sent: list[tuple[str, Payload, Any]] = []
        self._changes = changes

    async def post(self, path: str, payload: Payload, headers: Any = None) -> Any:
        self.sent.append((path, payload, headers))
        if isinstance(payload["input_ids"][0], list):
            pairs = zip(payload["input_ids"], payload["sampling_params"], strict=True)
            return [answer({"input_ids": ids, "sampling_params": params}, **self._changes) for ids, params in pairs]
        return answer(payload, **self._changes)


def make_state(tokenizer: ChatTokenizer, client: Client, **args: Any) -> GenerateState:
    values = {"rollout_max_context_len": None, "eval_max_context_len": None, "apply_chat_template_kwargs": {}, **args}
    return GenerateState(SimpleNamespace(**values), tokenizer, client)  # type: ignore[arg-type]


async def run(state: GenerateState, sample: Sample, **params: Any) -> Sample:
    values = {"max_new_tokens": 8, "sampling_seed": 1, **params}
    output = await SingleTurn()(GenerateFnInput(state, sample, values))
    assert output.samples is sample
    sample.validate()
    return sample


async def test_a_response_is_appended_to_the_prompt(tokenizer: ChatTokenizer) -> None:
    client = Client()
    sample = await run(make_state(tokenizer, client), Sample(prompt="hello"))
    assert sample.tokens[:5] == tokenizer.encode("hello")
    assert (sample.response_length, len(sample.rollout_log_probs or [])) == (4, 4)
    assert sample.status is Status.COMPLETED
    assert (sample.weight_versions, sample.token_weight_versions) == (["3"], [3] * 4)
    assert (sample.prefix_cache_info.cached_tokens, sample.prefix_cache_info.prompt_tokens) == (2, 5)


async def test_messages_are_written_by_the_chat_template(tokenizer: ChatTokenizer) -> None:
    client = Client()
    await run(make_state(tokenizer, client), Sample(prompt=[{"role": "user", "content": "hi"}]))
    sent = client.sent[0][1]["input_ids"]
    assert tokenizer.hf.decode(sent) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


async def test_weights_that_changed_under_a_request_are_known_by_token(tokenizer: ChatTokenizer) -> None:
    spans = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 4}]
    reply = answer({"input_ids": [1], "sampling_params": {}}, version="4")
    reply["meta_info"]["weight_versions"] = spans
    sample = Sample(tokens=[1])
    append_response(sample, reply)
    assert sample.weight_versions == ["3", "4"]
    assert sample.token_weight_versions == [3, 4, 4, 4]


async def test_an_aborted_response_is_continued_from_its_tokens(tokenizer: ChatTokenizer) -> None:
    client = Client(finish="abort", num_tokens=3)
    sample = await run(make_state(tokenizer, client), Sample(prompt="hello"))
    assert sample.status is Status.ABORTED
    cut = list(sample.tokens)
    client = Client(version="4", num_tokens=9)
    await run(make_state(tokenizer, client), sample)
    payload = client.sent[0][1]
    assert payload["input_ids"] == cut
    assert payload["sampling_params"]["max_new_tokens"] == 5
    assert (sample.response_length, sample.status) == (8, Status.COMPLETED)
    assert (sample.weight_versions, sample.token_weight_versions) == (["3", "4"], [3] * 3 + [4] * 5)


async def test_new_tokens_train_after_a_masked_part(tokenizer: ChatTokenizer) -> None:
    sample = Sample(prompt="x", tokens=[1, 2], response_length=1, rollout_log_probs=[-1.0], loss_mask=[0])
    await run(make_state(tokenizer, Client()), sample)
    assert sample.loss_mask == [0, 1, 1, 1, 1]


async def test_the_context_limit_bounds_the_response(tokenizer: ChatTokenizer) -> None:
    client = Client()
    state = make_state(tokenizer, client, rollout_max_context_len=7)
    await run(state, Sample(prompt="hello"))
    assert client.sent[0][1]["sampling_params"]["max_new_tokens"] == 2


async def test_a_prompt_that_fills_the_context_is_truncated_without_a_request(tokenizer: ChatTokenizer) -> None:
    client = Client()
    sample = await run(make_state(tokenizer, client, rollout_max_context_len=5), Sample(prompt="hello"))
    assert (sample.status, sample.response_length, client.sent) == (Status.TRUNCATED, 0, [])


async def test_a_routing_key_becomes_a_header(tokenizer: ChatTokenizer) -> None:
    client = Client()
    await run(make_state(tokenizer, client), Sample(prompt="x", routing_key="k"))
    assert client.sent[0][2] == {"X-SMG-Routing-Key": "k"}


def test_a_length_stop_is_a_truncation_and_speculation_is_counted() -> None:
    sample = Sample(tokens=[1])
    found = answer({"input_ids": [1], "sampling_params": {}}, finish="length")
    found["meta_info"] |= {"spec_verify_ct": 2, "spec_accept_token_num": 3, "spec_draft_token_num": 6}
    append_response(sample, found)
    assert sample.status is Status.TRUNCATED
    assert (sample.spec_info.accept_rate, sample.spec_info.accept_length) == (0.5, 2.0)


def test_a_version_that_is_no_number_has_no_place_per_token() -> None:
    sample = Sample(tokens=[1])
    append_response(sample, answer({"input_ids": [1], "sampling_params": {}}, version="default"))
    assert (sample.weight_versions, sample.token_weight_versions) == (["default"], None)


def test_an_answer_without_log_probs_is_refused() -> None:
    with pytest.raises(EngineError, match="without output_token_logprobs"):
        append_response(Sample(), {"text": "x", "meta_info": {}})


async def test_a_group_is_one_request_with_the_same_results(tokenizer: ChatTokenizer) -> None:
    client = Client()
    state = make_state(tokenizer, client, rollout_max_context_len=8)

    def inputs() -> list[GenerateFnInput]:
        samples = [Sample(prompt="hello"), Sample(prompt="too long"), Sample(prompt="world")]
        return [
            GenerateFnInput(state, sample, {"max_new_tokens": 8, "sampling_seed": seed})
            for seed, sample in enumerate(samples)
        ]

    one_by_one = [await SingleTurn()(input) for input in inputs()]
    client.sent.clear()
    assert await SingleTurn().together(inputs()) == one_by_one
    assert [len(payload["input_ids"]) for _, payload, _ in client.sent] == [2]
    assert [output.samples.status for output in one_by_one] == [  # type: ignore[union-attr]
        Status.COMPLETED,
        Status.TRUNCATED,
        Status.COMPLETED,
    ]


async def test_a_group_without_room_needs_no_request(tokenizer: ChatTokenizer) -> None:
    client = Client()
    state = make_state(tokenizer, client, rollout_max_context_len=2)
    await SingleTurn().together([GenerateFnInput(state, Sample(prompt="hello"), {})])
    assert client.sent == []

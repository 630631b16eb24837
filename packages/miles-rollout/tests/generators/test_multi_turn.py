from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rollout_fakes import FakeRewards

from miles.core.types.rollout import GenerateFnInput, GenerateFnOutput
from miles.core.types.sample import Sample, Status
from miles.rollout.generate_state import GenerateState
from miles.rollout.generators.adapt import as_list
from miles.rollout.generators.experts import ExpertShape
from miles.rollout.generators.multi_turn import MultiTurn
from miles.rollout.generators.registry import Generators
from miles.rollout.group_task import GroupWorker
from miles.rollout.slots import Slots
from miles.rollout.text import ChatTokenizer

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
SPECS = [ADD]
END = "<|im_end|>"
PROMPT = [{"role": "user", "content": "2 + 3?"}]


async def execute(name: str, params: dict[str, Any]) -> str:
    if params["a"] == 13:
        raise RuntimeError("unlucky")
    return str(params["a"] + params["b"])


def call(a: int, b: int) -> str:
    return f"<tool_call>{json.dumps({'name': 'add', 'arguments': {'a': a, 'b': b}})}</tool_call>{END}"


class Model:
    """Says ``turns`` one after another, token by token; remembers what it was sent."""

    def __init__(self, tokenizer: ChatTokenizer, *turns: str, experts: ExpertShape | None = None) -> None:
        self.tokenizer, self.turns, self.experts = tokenizer, list(turns), experts
        self.sent: list[dict[str, Any]] = []
        self.before: Callable[[], None] = lambda: None

    async def post(self, path: str, payload: dict[str, Any], headers: Any = None) -> Any:
        self.before()
        self.sent.append(payload)
        finish = "stop"
        tokens = self.tokenizer.encode(self.turns.pop(0))
        limit = payload["sampling_params"]["max_new_tokens"]
        if limit is not None and len(tokens) > limit:
            tokens, finish = tokens[:limit], "length"
        if tokens and self.tokenizer.hf.decode(tokens).endswith("~"):  # cut here by an abort
            tokens, finish = tokens[:-1], "abort"
        meta = {
            "output_token_logprobs": [[-0.01 * (n + 1) - len(self.sent), t, None] for n, t in enumerate(tokens)],
            "finish_reason": {"type": finish},
            "weight_version": str(len(self.sent)),
        }
        if self.experts is not None:
            rows = len(payload["input_ids"]) + len(tokens) - 1
            flat = np.full(rows * self.experts.layers * self.experts.per_token, len(self.sent), "<i4")
            meta["routed_experts"] = base64.b64encode(flat.tobytes()).decode()
        return {"text": self.tokenizer.hf.decode(tokens), "meta_info": meta}


def make_args(checkpoint: str, **changes: Any) -> Any:
    here = Path(__file__).stem
    sys.modules[here] = sys.modules[__name__]
    values = {
        "hf_checkpoint": checkpoint,
        "apply_chat_template_kwargs": {},
        "generate_max_turns": 4,
        "generate_multi_samples": False,
        "generate_tool_specs_path": f"{here}.SPECS",
        "generate_tool_call_parser": "qwen",
        "generate_execute_tool_function_path": f"{here}.execute",
        "generate_tool_timeout": 5.0,
        "rollout_max_context_len": None,
        "eval_max_context_len": None,
        "rollout_seed": 1,
    }
    return SimpleNamespace(**{**values, **changes})


async def converse(
    checkpoint: str, model: Model, sample: Sample | None = None, *, limit: int | None = 500, **changes: Any
) -> GenerateFnOutput:
    args = make_args(checkpoint, **changes)
    state = GenerateState(args, model.tokenizer, model)  # type: ignore[arg-type]
    state.experts = model.experts
    sample = Sample(prompt=PROMPT, index=3, group_index=1) if sample is None else sample
    output = await MultiTurn(args)(GenerateFnInput(state, sample, {"max_new_tokens": limit, "sampling_seed": 7}))
    for made in as_list(output.samples):
        made.validate()
    return output


def one(output: GenerateFnOutput) -> Sample:
    assert isinstance(output.samples, Sample)
    return output.samples


def trained(sample: Sample) -> list[int]:
    mask = sample.loss_mask or []
    return [token for token, on in zip(sample.response_tokens, mask, strict=True) if on]


async def test_ids_sent_are_ids_trained(checkpoint: str, tokenizer: ChatTokenizer) -> None:
    turns = [f"Hm.{call(2, 3)}", call(5, 4), f"It is 9.{END}"]
    model = Model(tokenizer, *turns)
    sample = one(await converse(checkpoint, model))
    # Every request continues the one before: its ids, what was sampled, what the template adds.
    for number, payload in enumerate(model.sent):
        assert sample.tokens[: len(payload["input_ids"])] == payload["input_ids"]
        end = len(payload["input_ids"]) + len(tokenizer.encode(turns[number]))
        assert sample.tokens[len(payload["input_ids"]) : end] == tokenizer.encode(turns[number])
    assert len(sample.tokens) == len(model.sent[-1]["input_ids"]) + len(tokenizer.encode(turns[-1]))
    # What trains is what was sampled, with the engine's log-probabilities; all else has none.
    assert trained(sample) == [token for turn in turns for token in tokenizer.encode(turn)]
    logps = [-0.01 * (n + 1) - k for k, turn in enumerate(turns, 1) for n in range(len(tokenizer.encode(turn)))]
    pairs = list(zip(sample.rollout_log_probs or [], sample.loss_mask or [], strict=True))
    assert [logp for logp, on in pairs if on] == logps
    assert {logp for logp, on in pairs if not on} == {0.0}
    assert sample.status is Status.COMPLETED
    assert (sample.metadata["round_number"], sample.metadata["tool_calls"]) == (3, 2)
    assert len(sample.token_weight_versions or []) == sample.response_length


async def test_the_conversation_reads_as_the_template_would_write_it(checkpoint: str, tokenizer: ChatTokenizer) -> None:
    sample = one(await converse(checkpoint, Model(tokenizer, call(2, 3), f"5{END}")))
    assert tokenizer.hf.decode(sample.tokens) == (
        "<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n"
        f"{call(2, 3)}\n<|im_start|>tool\n5<|im_end|>\n<|im_start|>assistant\n5<|im_end|>"
    )
    assert sample.response == tokenizer.hf.decode(sample.response_tokens)


async def test_several_calls_of_one_turn_are_answered_in_order(checkpoint: str, tokenizer: ChatTokenizer) -> None:
    both = call(1, 1).removesuffix(END) + call(2, 2)
    sample = one(await converse(checkpoint, Model(tokenizer, both, f"ok{END}")))
    assert "tool\n2<|im_end|>\n<|im_start|>tool\n4<|im_end|>" in sample.response


@pytest.mark.parametrize(
    ("turn", "kind", "told"),
    [
        (f"<tool_call>{{oops</tool_call>{END}", "malformed", "not JSON"),
        (f'<tool_call>{{"name": "sub"}}</tool_call>{END}', "unknown_tool", "there are: add"),
        (f'<tool_call>{{"name": "add", "arguments": {{"a": 1}}}}</tool_call>{END}', "bad_arguments", "missing b"),
        (call(13, 1), "error", "RuntimeError: unlucky"),
    ],
)
async def test_what_goes_wrong_is_told_to_the_model_and_counted(
    checkpoint: str, tokenizer: ChatTokenizer, turn: str, kind: str, told: str
) -> None:
    sample = one(await converse(checkpoint, Model(tokenizer, turn, f"Sorry.{END}")))
    assert "Error: " in sample.response
    assert told in sample.response
    assert sample.metadata["tool_failures"] == {kind: 1}
    assert sample.status is Status.COMPLETED


async def test_after_the_last_turn_no_tool_runs(checkpoint: str, tokenizer: ChatTokenizer) -> None:
    sample = one(await converse(checkpoint, Model(tokenizer, call(1, 1), call(2, 2)), generate_max_turns=2))
    assert (sample.status, sample.metadata["tool_calls"]) == (Status.TRUNCATED, 1)
    assert sample.loss_mask is not None
    assert sample.loss_mask[-1] == 1


async def test_the_response_limit_holds_for_the_whole_conversation(checkpoint: str, tokenizer: ChatTokenizer) -> None:
    model = Model(tokenizer, call(1, 1), f"{'word ' * 100}{END}")
    sample = one(await converse(checkpoint, model, limit=200))
    assert (sample.response_length, sample.status) == (200, Status.TRUNCATED)


async def test_the_context_limit_holds_too(checkpoint: str, tokenizer: ChatTokenizer) -> None:
    model = Model(tokenizer, call(1, 1), f"{'word ' * 100}{END}")
    sample = one(await converse(checkpoint, model, limit=None, rollout_max_context_len=180))
    assert (len(sample.tokens), sample.status) == (180, Status.TRUNCATED)


async def test_an_answer_that_does_not_fit_ends_the_conversation_before_it(
    checkpoint: str, tokenizer: ChatTokenizer
) -> None:
    first = len(tokenizer.encode(call(1, 1)))
    sample = one(await converse(checkpoint, Model(tokenizer, call(1, 1)), limit=first + 10))
    assert (sample.response_length, sample.status) == (first, Status.TRUNCATED)


async def test_an_aborted_turn_is_continued_where_it_was_cut(checkpoint: str, tokenizer: ChatTokenizer) -> None:
    whole = call(20, 3)
    model = Model(tokenizer, call(1, 1), whole[:30] + "~")
    sample = one(await converse(checkpoint, model))
    assert sample.status is Status.ABORTED
    model = Model(tokenizer, whole[30:], f"23{END}")
    sample = one(await converse(checkpoint, model, sample))
    assert sample.status is Status.COMPLETED
    assert trained(sample) == tokenizer.encode(call(1, 1) + whole + f"23{END}")
    assert (sample.metadata["round_number"], sample.metadata["tool_calls"]) == (3, 2)


async def test_after_an_abort_nothing_new_is_asked_for(checkpoint: str, tokenizer: ChatTokenizer) -> None:
    args = make_args(checkpoint)
    model = Model(tokenizer, call(1, 1), f"2{END}")
    state = GenerateState(args, tokenizer, model)  # type: ignore[arg-type]

    def stop() -> None:
        state.aborted = True

    model.before = stop
    sample = Sample(prompt=PROMPT)
    await MultiTurn(args)(GenerateFnInput(state, sample, {"max_new_tokens": 300}))
    assert (sample.status, len(model.sent)) == (Status.ABORTED, 1)
    state.aborted, model.before = False, lambda: None
    await MultiTurn(args)(GenerateFnInput(state, sample, {"max_new_tokens": 300}))
    assert (sample.status, sample.metadata["tool_calls"]) == (Status.COMPLETED, 1)


async def test_tools_of_the_row_serve_where_no_specs_are_given(checkpoint: str, tokenizer: ChatTokenizer) -> None:
    sample = Sample(prompt=PROMPT, metadata={"tools": SPECS})
    model = Model(tokenizer, call(2, 2), f"4{END}")
    made = one(await converse(checkpoint, model, sample, generate_tool_specs_path=None))
    assert made.metadata["tool_failures"] == {}


async def test_experts_of_the_last_answer_cover_the_conversation(checkpoint: str, tokenizer: ChatTokenizer) -> None:
    model = Model(tokenizer, call(2, 3), f"5{END}", experts=ExpertShape(2, 2))
    sample = one(await converse(checkpoint, model))
    assert sample.rollout_routed_experts is not None
    assert sample.rollout_routed_experts.shape == (len(sample.tokens) - 1, 2, 2)
    assert (sample.rollout_routed_experts == 2).all()


async def test_a_sample_of_every_turn(checkpoint: str, tokenizer: ChatTokenizer) -> None:
    turns = [call(2, 3), f"5{END}"]
    model = Model(tokenizer, *turns, experts=ExpertShape(1, 1))
    output = await converse(checkpoint, model, generate_multi_samples=True)
    first, second = as_list(output.samples)
    assert output.shared_reward
    for sample, turn, payload in zip((first, second), turns, model.sent, strict=True):
        assert sample.tokens == payload["input_ids"] + tokenizer.encode(turn)
        assert trained(sample) == sample.response_tokens == tokenizer.encode(turn)
        assert sample.response == turn
        assert sample.rollout_routed_experts is not None
        assert len(sample.rollout_routed_experts) == len(sample.tokens) - 1
    assert (first.status, second.status) == (Status.COMPLETED, Status.COMPLETED)
    assert first.non_generation_time == 0.0 < second.non_generation_time


async def test_turns_that_older_weights_made_stay_masked_in_samples_of_their_own(
    checkpoint: str, tokenizer: ChatTokenizer
) -> None:
    sample = one(await converse(checkpoint, Model(tokenizer, call(1, 1), "~"), generate_multi_samples=True))
    assert sample.status is Status.ABORTED
    sample.loss_mask = [0] * sample.response_length  # --mask-offpolicy-in-partial-rollout
    output = await converse(checkpoint, Model(tokenizer, f"2{END}"), sample, generate_multi_samples=True)
    first, second = as_list(output.samples)
    assert trained(first) == []
    assert trained(second) == tokenizer.encode(f"2{END}")


async def test_turns_of_one_conversation_share_its_reward(checkpoint: str, tokenizer: ChatTokenizer) -> None:
    args = make_args(checkpoint, generate_multi_samples=True, custom=None)
    model = Model(tokenizer, call(2, 3), f"5{END}")
    rewards = FakeRewards(lambda sample: 1.0 if sample.response == f"5{END}" else 0.0)
    worker = GroupWorker(
        GenerateState(args, tokenizer, model),  # type: ignore[arg-type]
        Generators("multi_turn", args),
        rewards,
        Slots(4),
    )
    made = await worker.run([Sample(prompt=PROMPT, index=8, group_index=4)], {"max_new_tokens": 300})
    assert [sample.reward for sample in made] == [1.0, 1.0]
    assert [(sample.index, sample.group_index, sample.rollout_id) for sample in made] == [(8, 4, 8)] * 2
    assert rewards.scored == [8]


async def test_a_second_attempt_starts_its_accounts_anew(checkpoint: str, tokenizer: ChatTokenizer) -> None:
    sample = one(await converse(checkpoint, Model(tokenizer, call(2, 3), f"5{END}")))
    sample.reset_for_retry()
    sample = one(await converse(checkpoint, Model(tokenizer, f"5{END}"), sample))
    assert (sample.metadata["turns"], sample.metadata["tool_calls"]) == ([[0, 2]], 0)


async def test_conversations_do_not_wait_for_each_other(checkpoint: str, tokenizer: ChatTokenizer) -> None:
    models = [Model(tokenizer, call(2, n), f"{n}{END}") for n in range(5)]
    made = await asyncio.gather(*(converse(checkpoint, model) for model in models))
    assert [one(output).metadata["round_number"] for output in made] == [2] * 5

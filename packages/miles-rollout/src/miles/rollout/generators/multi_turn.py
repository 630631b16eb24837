"""A conversation with tools: the model speaks, its tool calls are executed, it reads the answers and goes on."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from miles.core.protocols.tools import ToolCall, ToolCallParser, ToolSpec
from miles.core.registry import Registry, load_object
from miles.core.types.rollout import GenerateFnInput, GenerateFnOutput
from miles.core.types.sample import PrefixCacheInfo, Sample, SpecInfo, Status
from miles.rollout.generators.request import budget, generate
from miles.rollout.generators.response import append_observation
from miles.rollout.text import load_tokenizer
from miles.rollout.tools.continuation import Continuation
from miles.rollout.tools.execution import ToolAnswer, ToolRunner
from miles.rollout.tools.specs import load_tool_specs

TOOL_PARSERS = Registry("miles.tool_parsers")

TURNS = "turns"
"""Entry of a sample's metadata: [first response token, end] of each finished turn of the model."""
_TURN_START = "turn_start"
"""Where the turn begins that is being generated."""


class MultiTurn:
    """Up to ``--generate-max-turns`` turns in one sample, or with ``--generate-multi-samples`` in one sample each.

    Only what the model wrote trains.  A conversation ends when a turn calls no tool, or at a limit (TRUNCATED): then
    the last calls are not executed, since nobody would read the answers.  One that was aborted is continued.
    """

    resumes = True

    def __init__(self, args: Any) -> None:
        self._max_turns: int = args.generate_max_turns
        self._sample_per_turn: bool = args.generate_multi_samples
        path = args.generate_tool_specs_path
        self._tools: list[dict[str, Any]] | None = None if path is None else load_tool_specs(path)
        self._parse: ToolCallParser = TOOL_PARSERS.get(args.generate_tool_call_parser)
        self._runner = ToolRunner(load_object(args.generate_execute_tool_function_path), args.generate_tool_timeout)
        self._text = load_tokenizer(args.hf_checkpoint)
        self._continuation = Continuation(self._text, args.apply_chat_template_kwargs)

    async def __call__(self, input: GenerateFnInput) -> GenerateFnOutput:
        """The conversation that ``input.sample`` begins, or that it is in the middle of."""
        sample = input.sample
        tools: Sequence[ToolSpec] = self._tools or sample.metadata.get("tools") or ()
        if not sample.tokens:
            sample.tokens = input.state.prompt_ids(sample, tools)
        if sample.loss_mask is None:
            sample.loss_mask = [1] * sample.response_length
        if sample.response_length == 0:  # a second attempt starts its accounts anew
            sample.metadata = {**sample.metadata, TURNS: [], _TURN_START: 0, "tool_calls": 0, "tool_failures": {}}
        while await self._turn(input, tools):
            pass
        if self._sample_per_turn and sample.status in (Status.COMPLETED, Status.TRUNCATED) and sample.metadata[TURNS]:
            return GenerateFnOutput(self._split(sample), shared_reward=True)
        return GenerateFnOutput(sample)

    async def _turn(self, input: GenerateFnInput, tools: Sequence[ToolSpec]) -> bool:
        """One turn of the model, and the answers to its calls; whether another turn follows."""
        sample = input.sample
        if input.state.aborted:
            sample.status = Status.ABORTED
            return False
        if not await generate(input) or sample.status is Status.ABORTED:
            return False
        start = sample.metadata[_TURN_START]
        turns = [*sample.metadata[TURNS], [start, sample.response_length]]
        sample.metadata = {**sample.metadata, TURNS: turns, "round_number": len(turns)}
        if sample.status is not Status.COMPLETED:
            return False
        calls = self._parse(self._turn_text(sample, start), tools).calls
        if not calls:
            return False
        if len(turns) < self._max_turns:
            return await self._answer(input, tools, calls)
        sample.status = Status.TRUNCATED
        return False

    async def _answer(self, input: GenerateFnInput, tools: Sequence[ToolSpec], calls: Sequence[ToolCall]) -> bool:
        """Execute ``calls`` in order and append the answers; False when they do not fit."""
        sample = input.sample
        answers = [await self._runner.run(call, tools) for call in calls]
        _count(sample, answers)
        ids = self._continuation.tool_answers(sample.tokens, calls, [answer.content for answer in answers])
        left = budget(input)
        if left is not None and len(ids) >= left:
            sample.status = Status.TRUNCATED
            return False
        skip = bool(input.sampling_params.get("skip_special_tokens"))
        append_observation(sample, ids, self._text.hf.decode(ids, skip_special_tokens=skip))
        sample.metadata = {**sample.metadata, _TURN_START: sample.response_length}
        return True

    def _turn_text(self, sample: Sample, start: int) -> str:
        """What the model wrote in its turn, without the token that ended it."""
        ids = sample.response_tokens[start:]
        if ids and ids[-1] == self._text.hf.eos_token_id:
            ids = ids[:-1]
        text: str = self._text.hf.decode(ids, skip_special_tokens=False)
        return text

    def _split(self, sample: Sample) -> list[Sample]:
        """A sample for each turn: everything before it is its prompt."""
        return [self._one_turn(sample, number) for number in range(len(sample.metadata[TURNS]))]

    def _one_turn(self, sample: Sample, number: int) -> Sample:
        start, end = sample.metadata[TURNS][number]
        last = number == len(sample.metadata[TURNS]) - 1
        prompt = sample.prompt_length
        turn = copy(sample)
        turn.tokens = sample.tokens[: prompt + end]
        turn.response_length = end - start
        turn.response = self._text.hf.decode(sample.response_tokens[start:end])
        turn.loss_mask = (sample.loss_mask or [])[start:end]  # earlier turns of a resumed conversation may not train
        turn.rollout_log_probs = (sample.rollout_log_probs or [])[start:end]
        if sample.token_weight_versions is not None:
            turn.token_weight_versions = sample.token_weight_versions[start:end]
        if sample.rollout_routed_experts is not None:
            turn.rollout_routed_experts = sample.rollout_routed_experts[: prompt + end - 1]
        turn.metadata = {**sample.metadata, "turn": number}
        if not last:
            turn.status = Status.COMPLETED
            turn.spec_info, turn.prefix_cache_info, turn.non_generation_time = SpecInfo(), PrefixCacheInfo(), 0.0
        return turn


def _count(sample: Sample, answers: Sequence[ToolAnswer]) -> None:
    """Keep account of calls, failures and time."""
    failures = dict(sample.metadata["tool_failures"])
    for answer in answers:
        if answer.failure is not None:
            failures[answer.failure] = failures.get(answer.failure, 0) + 1
    calls = sample.metadata["tool_calls"] + len(answers)
    sample.metadata = {**sample.metadata, "tool_calls": calls, "tool_failures": failures}
    sample.non_generation_time += sum(answer.seconds for answer in answers)

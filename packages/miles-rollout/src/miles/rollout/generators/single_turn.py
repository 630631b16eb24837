"""One prompt, one response: the default generate function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from miles.core.types.rollout import GenerateFnInput, GenerateFnOutput
from miles.core.types.sample import Status
from miles.rollout.generate_state import GenerateState
from miles.rollout.generators.response import append_response


class SingleTurn:
    """Generates a response, or the rest of one that was cut by an abort."""

    async def __call__(self, input: GenerateFnInput) -> GenerateFnOutput:
        """One sample, one request."""
        params = _prepare(input)
        if params is not None:
            sample, state = input.sample, input.state
            headers = {"X-SMG-Routing-Key": sample.routing_key} if sample.routing_key else None
            payload = generate_payload(state, sample.tokens, params)
            append_response(sample, await state.client.post("/generate", payload, headers), state.experts)
        return GenerateFnOutput(input.sample)

    async def together(self, inputs: Sequence[GenerateFnInput]) -> list[GenerateFnOutput]:
        """Several samples, one request: a group costs one passage through client, router and server."""
        prepared = [(input.sample, params) for input in inputs if (params := _prepare(input)) is not None]
        if prepared:
            state = inputs[0].state
            ids = [sample.tokens for sample, _ in prepared]
            answers = await state.client.post("/generate", generate_payload(state, ids, [p for _, p in prepared]))
            for (sample, _), answer in zip(prepared, answers, strict=True):
                append_response(sample, answer, state.experts)
        return [GenerateFnOutput(input.sample) for input in inputs]


def _prepare(input: GenerateFnInput) -> dict[str, Any] | None:
    """Tokenize the prompt; sampling parameters with what the limits leave, None when that is nothing."""
    state: GenerateState = input.state
    sample, params = input.sample, input.sampling_params
    if not sample.tokens:
        sample.tokens = state.prompt_ids(sample)
    limits = []
    if params.get("max_new_tokens") is not None:
        limits.append(params["max_new_tokens"] - sample.response_length)
    context = state.args.eval_max_context_len if input.evaluation else state.args.rollout_max_context_len
    if context is not None:
        limits.append(context - len(sample.tokens))
    budget = min(limits, default=None)
    if budget is not None and budget <= 0:
        sample.status = Status.TRUNCATED
        return None
    return {**params, "max_new_tokens": budget}


def generate_payload(state: GenerateState, input_ids: Any, sampling_params: Any) -> dict[str, Any]:
    """The body of ``/generate`` for one prompt, or for a list of prompts with a list of parameters."""
    payload = {"input_ids": input_ids, "sampling_params": sampling_params, "return_logprob": True}
    if state.experts is not None:
        payload["return_routed_experts"] = True
    return payload

"""One prompt, one response: the default generate function."""

from __future__ import annotations

from typing import Any

from miles.core.types.rollout import GenerateFnInput, GenerateFnOutput
from miles.core.types.sample import Sample, Status
from miles.rollout.generate_state import GenerateState
from miles.rollout.generators.response import append_response


async def generate(input: GenerateFnInput) -> GenerateFnOutput:
    """Generate the response, or the rest of one that was cut by an abort."""
    state: GenerateState = input.state
    sample = input.sample
    if not sample.tokens:
        sample.tokens = state.prompt_ids(sample)
    budget = _budget(state, sample, input.sampling_params, input.evaluation)
    if budget is not None and budget <= 0:
        sample.status = Status.TRUNCATED
        return GenerateFnOutput(sample)
    payload = {
        "input_ids": sample.tokens,
        "sampling_params": {**input.sampling_params, "max_new_tokens": budget},
        "return_logprob": True,
    }
    headers = {"X-SMG-Routing-Key": sample.routing_key} if sample.routing_key else None
    append_response(sample, await state.client.post("/generate", payload, headers))
    return GenerateFnOutput(sample)


def _budget(state: GenerateState, sample: Sample, params: dict[str, Any], evaluation: bool) -> int | None:
    """New tokens that the response and context limits leave; None without a limit."""
    limits = []
    if params.get("max_new_tokens") is not None:
        limits.append(params["max_new_tokens"] - sample.response_length)
    context = state.args.eval_max_context_len if evaluation else state.args.rollout_max_context_len
    if context is not None:
        limits.append(context - len(sample.tokens))
    return min(limits, default=None)

"""Requests to ``/generate``: what a sample may still generate, and the body that asks for it."""

from __future__ import annotations

import asyncio
from typing import Any

from miles.core.types.rollout import GenerateFnInput
from miles.core.types.sample import Status
from miles.rollout.generate_state import GenerateState
from miles.rollout.generators.response import append_response
from miles.rollout.multimodal import request_fields


def budget(input: GenerateFnInput) -> int | None:
    """Tokens that response and context limits leave; None without a limit."""
    sample, state = input.sample, input.state
    limits = []
    if input.sampling_params.get("max_new_tokens") is not None:
        limits.append(input.sampling_params["max_new_tokens"] - sample.response_length)
    context = state.args.eval_max_context_len if input.evaluation else state.args.rollout_max_context_len
    if context is not None:
        limits.append(context - len(sample.tokens))
    return min(limits, default=None)


def prepare(input: GenerateFnInput) -> dict[str, Any] | None:
    """Tokenize the prompt; sampling parameters with what the limits leave, None when that is nothing (TRUNCATED)."""
    sample = input.sample
    if not sample.tokens:
        sample.tokens = input.state.prompt_ids(sample)
    left = budget(input)
    if left is not None and left <= 0:
        sample.status = Status.TRUNCATED
        return None
    return {**input.sampling_params, "max_new_tokens": left}


def payload(state: GenerateState, input_ids: Any, sampling_params: Any) -> dict[str, Any]:
    """The body for one prompt, or for a list of prompts with a list of parameters."""
    body = {"input_ids": input_ids, "sampling_params": sampling_params, "return_logprob": True}
    if state.experts is not None:
        body["return_routed_experts"] = True
    return body


async def generate(input: GenerateFnInput) -> bool:
    """Continue the sample's tokens with one request; False when the limits leave nothing to generate."""
    params = prepare(input)
    if params is None:
        return False
    sample, state = input.sample, input.state
    headers = {"X-SMG-Routing-Key": sample.routing_key} if sample.routing_key else None
    body = payload(state, sample.tokens, params)
    if sample.multimodal_inputs:
        body |= await asyncio.to_thread(request_fields, sample.multimodal_inputs)  # reads files
    answer = await state.client.post("/generate", body, headers)
    append_response(sample, answer, state.experts)
    return True

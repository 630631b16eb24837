"""An agent of the user's talks to the model as to OpenAI's; a session of the router records it token by token."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Mapping
from typing import Any

from miles.core.errors import EngineError, RolloutError
from miles.core.registry import load_object
from miles.core.types.rollout import GenerateFnInput, GenerateFnOutput
from miles.core.types.sample import Sample, Status
from miles.rollout import threads
from miles.rollout.sessions import Session

logger = logging.getLogger(__name__)

AGENT_ERROR = "agent_error"
"""Entry of a sample's metadata: why its agent did not come to an end."""

_CHAT_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
_CHAT_PARAMS = ("temperature", "top_p", "top_k", "stop", "stop_token_ids", *_CHAT_NAMES)
_ABORT_INTERVAL_S = 1.0
_RECORDED = (
    "tokens", "response", "response_length", "loss_mask", "rollout_log_probs", "weight_versions",
    "token_weight_versions", "rollout_routed_experts", "prefix_cache_info", "status",
)  # fmt: skip


class Agentic:
    """Calls ``--custom-agent-function-path`` once per sample and takes what its session recorded.

    An agent that fails or takes too long leaves a sample of what it had said by then, marked in its metadata and
    counted.  When the rollout ends before it, it is cancelled, and starts anew in a later one.
    """

    def __init__(self, args: Any) -> None:
        self._agent = load_object(args.custom_agent_function_path)
        self._timeout_s: float = args.agent_timeout

    async def __call__(self, input: GenerateFnInput) -> GenerateFnOutput:
        """One run of the agent."""
        sample, state = input.sample, input.state
        args = state.args
        async with Session(state.client) as session:
            task = asyncio.ensure_future(self._run(session, input))
            if not await _finished(task, state):
                sample.status = Status.ABORTED
                return GenerateFnOutput(sample)
            result, error = task.result()
            context = args.eval_max_context_len if input.evaluation else args.rollout_max_context_len
            made = await session.samples(context, state.experts)
        if not made:
            raise EngineError(f"the agent asked the model nothing: {error or 'it returned without a request'}")
        outcome = {**result, AGENT_ERROR: error} if error else result
        if len(made) == 1:
            return GenerateFnOutput(_fill(sample, made[0], outcome))
        return GenerateFnOutput([_fill(copy.copy(sample), one, outcome) for one in made])

    async def _run(self, session: Session, input: GenerateFnInput) -> tuple[dict[str, Any], str | None]:
        """What the agent returned, and what went wrong."""
        sample = input.sample
        try:
            async with asyncio.timeout(self._timeout_s) as deadline:
                result = await threads.call(
                    self._agent,
                    base_url=session.url,
                    prompt=copy.deepcopy(sample.prompt),
                    request_kwargs=request_kwargs(input.sampling_params),
                    metadata=copy.deepcopy(sample.metadata),
                )
        except Exception as error:  # a function of the user's: the sample is its domain of failure
            if isinstance(error, TimeoutError) and deadline.expired():
                return {}, f"it took longer than --agent-timeout {self._timeout_s:g} seconds"
            logger.warning("sample %s: the agent failed", sample.index, exc_info=True)
            return {}, f"{type(error).__name__}: {error}"
        if result is not None and not isinstance(result, Mapping):
            raise RolloutError(
                f"--custom-agent-function-path returned a {type(result).__name__}, expected a mapping or None"
            )
        return dict(result or {}), None


def request_kwargs(sampling_params: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters under the names of chat completions; the agent passes them with every request."""
    given = {name: sampling_params.get(name) for name in _CHAT_PARAMS}
    return {_CHAT_NAMES.get(name, name): value for name, value in given.items() if value is not None}


async def _finished(task: asyncio.Future[Any], state: Any) -> bool:
    """Wait for ``task``; cancel it and return False when the rollout ends first."""
    try:
        while not (await asyncio.wait({task}, timeout=_ABORT_INTERVAL_S))[0]:
            if state.aborted:
                return False
        return True
    finally:
        task.cancel()


def _fill(sample: Sample, made: Sample, outcome: Mapping[str, Any]) -> Sample:
    """Write what was recorded, and what the agent returned, into ``sample``."""
    for name in _RECORDED:
        setattr(sample, name, getattr(made, name))
    sample.metadata = {**sample.metadata, **made.metadata, "round_number": made.metadata.get("num_turns", 1), **outcome}
    sample.metadata.pop("reward", None)
    if outcome.get("reward") is not None:
        sample.reward = outcome["reward"]
    metrics = outcome.get("agent_metrics") or {}
    sample.non_generation_time = float(metrics.get("total_tool_time", 0.0))
    return sample

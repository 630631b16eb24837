"""The signatures of users' hooks, stated once.

A hook is named by a flag, as ``package.module.attribute`` or ``package.module:attribute``.  ``args`` holds every flag
by its flat name, values of ``--custom-config-path``, and on the rollout side the router's address as
``args.sglang_router_ip`` and ``args.sglang_router_port``.  Synchronous hooks of the rollout side run in a thread, never
on the event loop.  ``miles.core.types.hook_table`` says which flag names which hook.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from miles.core.types.rollout import (
    DynamicFilterOutput,
    GenerateFnInput,
    GenerateFnOutput,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
)
from miles.core.types.sample import Group, Sample

if TYPE_CHECKING:
    import torch

    PerSample = list[torch.Tensor]
    """One tensor per sample, over its response tokens."""


class RolloutFunction(Protocol):
    """Make one rollout, or with ``evaluation`` the results of every evaluation data set.

    Groups of samples (elements may be lists), or a mapping from data set to ``rewards``, ``truncated`` and ``samples``,
    are accepted in place of the outputs.  A coroutine function runs on the rollout side's event loop, any other beside
    it.  An attribute ``needs_engines = False`` says that no engines are to be started.
    """

    def __call__(
        self, args: Any, rollout_id: int, data_source: Any, evaluation: bool = False
    ) -> RolloutFnTrainOutput | RolloutFnEvalOutput: ...


class RolloutClass(Protocol):
    """A class: constructed once, called for every rollout and, if it is named for both, every evaluation."""

    def __init__(self, input: RolloutFnConstructorInput) -> None: ...

    def __call__(
        self, input: RolloutFnTrainInput | RolloutFnEvalInput
    ) -> RolloutFnTrainOutput | RolloutFnEvalOutput: ...


class GenerateFunction(Protocol):
    """Make one sample's response.

    ``sampling_params`` are the engine's.  Change the given sample and return it, or return several samples of one
    execution.  A coroutine function with one parameter, or a class whose objects are such; its constructor takes
    nothing or ``args``.
    """

    def __call__(self, input: GenerateFnInput) -> Awaitable[GenerateFnOutput]: ...


class LegacyGenerateFunction(Protocol):
    """The older form.  ``evaluation`` is passed if the function takes it."""

    def __call__(
        self, args: Any, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
    ) -> Awaitable[Sample | list[Sample]]: ...


class ExecuteTool(Protocol):
    """Execute one tool call; what it returns is what the model reads (text, or values that have a JSON form).

    A coroutine function, a plain one, or a class without constructor arguments whose objects are such.  An exception
    becomes an answer that says what went wrong; ``--generate-tool-timeout`` bounds the time.
    """

    def __call__(self, name: str, params: dict[str, Any]) -> Awaitable[str] | str: ...


class Agent(Protocol):
    """Hold a conversation with the model at ``{base_url}/v1/chat/completions``, as with OpenAI's.

    ``request_kwargs`` are the sampling parameters to pass with every request.  What is returned goes to the sample's
    metadata; ``reward`` becomes its reward, and the numbers of ``agent_metrics`` are logged (``total_tool_time``:
    seconds without the model).  Called by keywords; a coroutine function is cancelled when the rollout ends before it.
    """

    def __call__(
        self,
        *,
        base_url: str,
        prompt: str | list[dict[str, Any]],
        request_kwargs: dict[str, Any],
        metadata: dict[str, Any],
    ) -> Awaitable[Mapping[str, Any] | None] | Mapping[str, Any] | None: ...


class DynamicFilter(Protocol):
    """Whether to train on a finished, scored group."""

    def __call__(self, args: Any, samples: Group) -> DynamicFilterOutput | bool: ...


class BufferFilter(Protocol):
    """Take at most ``num_samples`` groups out of ``buffer`` and return them.

    What is returned must be removed from ``buffer`` in place.  ``rollout_id`` is None.
    """

    def __call__(self, args: Any, rollout_id: int | None, buffer: list[Group], num_samples: int) -> list[Group]: ...


class RolloutSampleFilter(Protocol):
    """Set ``remove_sample`` on samples that shall not train.  Returns nothing."""

    def __call__(self, args: Any, samples: list[Group]) -> None: ...


class AllSamplesProcess(Protocol):
    """See every finished group of a rollout, dropped ones included."""

    def __call__(self, args: Any, all_samples: list[Group], data_source: Any) -> None: ...


class RewardPostProcess(Protocol):
    """Raw rewards, and the rewards to train on; one of each per sample."""

    def __call__(self, args: Any, samples: list[Sample]) -> tuple[Sequence[float], Sequence[float]]: ...


class ConvertSamples(Protocol):
    """Columns of the training batch, by name.

    ``tokens``, ``response_lengths`` and ``rewards`` are required; ``loss_masks``, ``raw_reward``, ``truncated``,
    ``sample_indices``, ``group_indices``, ``rollout_log_probs``, ``teacher_log_probs`` and ``rollout_routed_experts``
    have their usual meaning.  Every other name becomes a column of ``RolloutBatch.extra``.
    """

    def __call__(self, args: Any, samples: list[Sample]) -> Mapping[str, Sequence[Any]]: ...


class RolloutLog(Protocol):
    """Truthy suppresses the default rollout metrics."""

    def __call__(
        self,
        rollout_id: int,
        args: Any,
        samples: list[Sample],
        rollout_extra_metrics: Mapping[str, float],
        rollout_time: float,
    ) -> object: ...


class EvalLog(Protocol):
    """Truthy suppresses the default evaluation metrics.

    ``data`` maps a data set's name to ``{"rewards", "truncated", "samples"}``.
    """

    def __call__(
        self, rollout_id: int, args: Any, data: Mapping[str, Mapping[str, Any]], extra_metrics: Mapping[str, float]
    ) -> object: ...


class RolloutDataPostprocess(Protocol):
    """See a rollout on every training rank when log-probabilities and advantages are known.

    ``data`` holds lists with one entry per sample (``tokens``, ``loss_masks``, ``log_probs`` ...).  ``advantages`` and
    ``returns`` may be changed in place, alike on every rank.
    """

    def __call__(self, args: Any, data: Mapping[str, Any]) -> None: ...


class CustomLossFunction(Protocol):
    """A scalar to differentiate, and detached scalars to log.

    ``batch`` holds ``tokens`` (prompt and response ids), ``total_lengths``, ``response_lengths``, ``loss_masks``, and
    those of ``advantages``, ``returns``, ``log_probs``, ``ref_log_probs``, ``rollout_log_probs`` and ``values`` that
    are known; one entry per sample.  ``logits`` [N, V] are those of all tokens, samples end to end, divided by the
    temperature. ``sum_of_sample_mean`` reduces [T] as the loss type does.  Both results are sums: they are divided by
    the number of samples (with ``--calculate-per-token-loss`` tokens) of the optimizer step.
    """

    def __call__(
        self,
        args: Any,
        batch: Mapping[str, Any],
        logits: torch.Tensor,
        sum_of_sample_mean: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]: ...


class CustomCorrectionFunction(Protocol):
    """The corrected policy loss [T], the masks to train with, and metrics [T].

    ``parallel_state`` and ``max_seq_lens`` are None: samples are whole and packed.
    """

    def __call__(
        self,
        *,
        args: Any,
        pg_loss: torch.Tensor,
        train_log_probs: PerSample,
        rollout_log_probs: PerSample,
        loss_masks: PerSample,
        total_lengths: Sequence[int],
        response_lengths: Sequence[int],
        parallel_state: None,
        max_seq_lens: None,
    ) -> tuple[torch.Tensor, PerSample, Mapping[str, torch.Tensor]]: ...


class PgReducerFactory(Protocol):
    """Make the function that reduces the policy loss [T] to a scalar."""

    def __call__(
        self,
        total_lengths: Sequence[int],
        response_lengths: Sequence[int],
        loss_masks: PerSample,
        calculate_per_token_loss: bool,
    ) -> Callable[[torch.Tensor], torch.Tensor]: ...


class MegatronInit(Protocol):
    """Called at the end of a Megatron rank's initialization."""

    def __call__(self, args: Any) -> None: ...


class MegatronBeforeLogProb(Protocol):
    """Called before a forward pass for log-probabilities; ``store_prefix`` is "", ``ref_`` or ``teacher_``."""

    def __call__(self, args: Any, model: Any, store_prefix: str) -> None: ...


class MegatronBeforeTrainStep(Protocol):
    """Called before every optimizer step, with the gradients at zero."""

    def __call__(
        self, args: Any, rollout_id: int, step_id: int, model: Any, optimizer: Any, opt_param_scheduler: Any
    ) -> None: ...


class ModelProvider(Protocol):
    """Build the Megatron model of one pipeline stage; ``vp_stage`` is passed if the function takes it."""

    def __call__(self, pre_process: bool, post_process: bool, vp_stage: int | None = None) -> Any: ...


__all__ = [
    "Agent",
    "AllSamplesProcess",
    "BufferFilter",
    "ConvertSamples",
    "CustomCorrectionFunction",
    "CustomLossFunction",
    "DynamicFilter",
    "EvalLog",
    "ExecuteTool",
    "GenerateFunction",
    "LegacyGenerateFunction",
    "MegatronBeforeLogProb",
    "MegatronBeforeTrainStep",
    "MegatronInit",
    "ModelProvider",
    "PgReducerFactory",
    "RewardPostProcess",
    "RolloutClass",
    "RolloutDataPostprocess",
    "RolloutFunction",
    "RolloutLog",
    "RolloutSampleFilter",
]

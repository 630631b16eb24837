"""The signatures of users' hooks, stated once.

A hook is named by a flag, as ``package.module.attribute`` or ``package.module:attribute``.  ``args`` holds every flag
by its flat name, values of ``--custom-config-path``, and on the rollout side the router's address as
``args.sglang_router_ip`` and ``args.sglang_router_port``.  Synchronous hooks of the rollout side run in a thread, never
on the event loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Protocol

from miles.core.types.rollout import DynamicFilterOutput, GenerateFnInput, GenerateFnOutput
from miles.core.types.sample import Group, Sample


class GenerateFunction(Protocol):
    """``--custom-generate-function-path``: make one sample's response.

    ``sampling_params`` are the engine's.  Change the given sample and return it, or return several samples of one
    execution.
    A coroutine function with one parameter, or a class without constructor arguments whose instances are such.
    """

    def __call__(self, input: GenerateFnInput) -> Awaitable[GenerateFnOutput]: ...


class LegacyGenerateFunction(Protocol):
    """``--custom-generate-function-path``, the older form.  ``evaluation`` is passed if the function takes it."""

    def __call__(
        self, args: Any, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
    ) -> Awaitable[Sample | list[Sample]]: ...


class DynamicFilter(Protocol):
    """``--dynamic-sampling-filter-path``: whether to train on a finished, scored group."""

    def __call__(self, args: Any, samples: Group) -> DynamicFilterOutput | bool: ...


class BufferFilter(Protocol):
    """``--buffer-filter-path``: take at most ``num_samples`` groups out of ``buffer`` and return them.

    What is returned must be removed from ``buffer`` in place.  ``rollout_id`` is None.
    """

    def __call__(self, args: Any, rollout_id: int | None, buffer: list[Group], num_samples: int) -> list[Group]: ...


class RolloutSampleFilter(Protocol):
    """``--rollout-sample-filter-path``: set ``remove_sample`` on samples that shall not train.  Returns nothing."""

    def __call__(self, args: Any, samples: list[Group]) -> None: ...


class AllSamplesProcess(Protocol):
    """``--rollout-all-samples-process-path``: see every finished group of a rollout, dropped ones included."""

    def __call__(self, args: Any, all_samples: list[Group], data_source: Any) -> None: ...


class RewardPostProcess(Protocol):
    """``--custom-reward-post-process-path``: raw rewards, and the rewards to train on; one of each per sample."""

    def __call__(self, args: Any, samples: list[Sample]) -> tuple[Sequence[float], Sequence[float]]: ...


class ConvertSamples(Protocol):
    """``--custom-convert-samples-to-train-data-path``: columns of the training batch, by name.

    ``tokens``, ``response_lengths`` and ``rewards`` are required; ``loss_masks``, ``raw_reward``, ``truncated``,
    ``sample_indices``, ``group_indices``, ``rollout_log_probs``, ``teacher_log_probs`` and ``rollout_routed_experts``
    have their usual meaning.  Every other name becomes a column of ``RolloutBatch.extra``.
    """

    def __call__(self, args: Any, samples: list[Sample]) -> Mapping[str, Sequence[Any]]: ...


class RolloutLog(Protocol):
    """``--custom-rollout-log-function-path``: truthy suppresses the default rollout metrics."""

    def __call__(
        self,
        rollout_id: int,
        args: Any,
        samples: list[Sample],
        rollout_extra_metrics: Mapping[str, float],
        rollout_time: float,
    ) -> object: ...


class EvalLog(Protocol):
    """``--custom-eval-rollout-log-function-path``: truthy suppresses the default evaluation metrics.

    ``data`` maps a data set's name to ``{"rewards", "truncated", "samples"}``.
    """

    def __call__(
        self, rollout_id: int, args: Any, data: Mapping[str, Mapping[str, Any]], extra_metrics: Mapping[str, float]
    ) -> object: ...


__all__ = [
    "AllSamplesProcess",
    "BufferFilter",
    "ConvertSamples",
    "DynamicFilter",
    "EvalLog",
    "GenerateFunction",
    "LegacyGenerateFunction",
    "RewardPostProcess",
    "RolloutLog",
    "RolloutSampleFilter",
]

"""Data that crosses the borders between packages."""

from miles.core.types.batch import RolloutBatch
from miles.core.types.rollout import (
    DynamicFilterOutput,
    EvalResult,
    GenerateFnInput,
    GenerateFnOutput,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
)
from miles.core.types.sample import Group, PrefixCacheInfo, Sample, SpecInfo, Status

__all__ = [
    "DynamicFilterOutput",
    "EvalResult",
    "GenerateFnInput",
    "GenerateFnOutput",
    "Group",
    "PrefixCacheInfo",
    "RolloutBatch",
    "RolloutFnConstructorInput",
    "RolloutFnEvalInput",
    "RolloutFnEvalOutput",
    "RolloutFnTrainInput",
    "RolloutFnTrainOutput",
    "Sample",
    "SpecInfo",
    "Status",
]

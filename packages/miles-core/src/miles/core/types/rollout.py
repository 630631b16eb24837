"""What a rollout function returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from miles.core.types.sample import Group, Sample


@dataclass(slots=True)
class RolloutFnTrainOutput:
    """Groups of one training rollout, and metrics to log with it."""

    samples: list[Group]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class EvalResult:
    """The samples of one evaluation dataset and their scalar rewards, in order of sample index."""

    rewards: list[float]
    truncated: list[bool]
    samples: list[Sample]


@dataclass(slots=True)
class RolloutFnEvalOutput:
    """Results by dataset name, and metrics to log with them."""

    data: dict[str, EvalResult]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RolloutFnConstructorInput:
    """What a class named by ``--rollout-function-path`` is constructed with."""

    args: Any
    data_source: Any


@dataclass(frozen=True, slots=True)
class RolloutFnTrainInput:
    """What its object is called with for a training rollout."""

    rollout_id: int
    weight_version: int
    """Of the weights that the engines hold."""


@dataclass(frozen=True, slots=True)
class RolloutFnEvalInput:
    """What its object is called with for an evaluation."""

    rollout_id: int
    generate_state: Any
    """What generate functions work with."""
    weight_version: int
    hf_dir: str | None = None
    """Exported weights to evaluate; None: those of the engines."""


@dataclass(frozen=True, slots=True)
class DynamicFilterOutput:
    """Verdict of a dynamic sampling filter on one group."""

    keep: bool
    reason: str | None = None

    def __bool__(self) -> bool:
        return self.keep


@dataclass(frozen=True, slots=True)
class GenerateFnInput:
    """Argument of a generate function of the one-argument form."""

    state: Any
    sample: Sample
    sampling_params: dict[str, Any]
    evaluation: bool = False


@dataclass(frozen=True, slots=True)
class GenerateFnOutput:
    """A generate function's result: one sample, or several from one execution."""

    samples: Sample | list[Sample]
    shared_reward: bool = False
    """Only the last sample is graded, and its reward is that of all: they are turns of one conversation."""

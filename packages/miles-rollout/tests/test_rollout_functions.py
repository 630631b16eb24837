from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from rollout_fakes import FakeSource

from miles.core.types.rollout import (
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
)
from miles.rollout.rollout_functions import RolloutFunctions


class Own:
    """A rollout class that notes what it gets."""

    made = 0
    needs_engines = False

    def __init__(self, input: RolloutFnConstructorInput) -> None:
        type(self).made += 1
        self.given = input
        self.calls: list[Any] = []

    def __call__(self, input: RolloutFnTrainInput | RolloutFnEvalInput) -> RolloutFnTrainOutput:
        self.calls.append(input)
        return RolloutFnTrainOutput([])


def test_a_function_stays_what_it_is() -> None:
    def function(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
        return []

    assert RolloutFunctions(None, None, lambda: 0).adapt(function) is function


def test_a_class_is_constructed_once_and_serves_rollouts_and_evaluation() -> None:
    Own.made = 0
    args, source = SimpleNamespace(generate_state="state"), FakeSource()
    functions = RolloutFunctions(args, source, lambda: 7)
    rollout, evaluation = functions.adapt(Own), functions.adapt(Own)
    assert (Own.made, rollout is evaluation) == (1, True)
    rollout(args, 3, source)
    evaluation(args, 4, source, evaluation=True)
    inner: Any = rollout
    assert inner.given == RolloutFnConstructorInput(args, source)
    assert inner.calls == [RolloutFnTrainInput(3, 7), RolloutFnEvalInput(4, "state", 7, None)]


def test_attributes_of_the_object_show_through() -> None:
    rollout: Any = RolloutFunctions(None, None, lambda: 0).adapt(Own)
    assert rollout.needs_engines is False
    assert getattr(rollout, "continuous", "no") == "no"

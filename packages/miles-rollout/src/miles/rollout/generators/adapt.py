"""Generate functions of every documented form, called alike."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from miles.core.types.rollout import GenerateFnInput, GenerateFnOutput
from miles.core.types.sample import Sample

One = Callable[[GenerateFnInput], Awaitable[list[Sample]]]
Together = Callable[[Sequence[GenerateFnInput]], Awaitable[list[GenerateFnOutput]]]


@dataclass(frozen=True, slots=True)
class Generator:
    """A generate function."""

    one: One
    """Makes the samples of one execution: one, or several when the function returns a list."""
    together: Together | None = None
    """Makes the samples of a group at once, where the function has a method of that name: it saves requests."""


def adapt(function: Any) -> Generator:
    """Accept ``(input)``, a class of such, and the older ``(args, sample, sampling_params[, evaluation])``."""
    if inspect.isclass(function):
        function = function()
    parameters = list(inspect.signature(function).parameters.values())
    if len(parameters) >= 3 and parameters[0].name != "input":
        return Generator(_legacy(function, any(parameter.name == "evaluation" for parameter in parameters)))
    return Generator(_one_argument(function), getattr(function, "together", None))


def as_list(samples: Sample | list[Sample]) -> list[Sample]:
    """One sample as a list of it."""
    return samples if isinstance(samples, list) else [samples]


def _one_argument(function: Any) -> One:
    async def call(input: GenerateFnInput) -> list[Sample]:
        output: GenerateFnOutput = await function(input)
        return as_list(output.samples)

    return call


def _legacy(function: Any, takes_evaluation: bool) -> One:
    async def call(input: GenerateFnInput) -> list[Sample]:
        keywords = {"evaluation": input.evaluation} if takes_evaluation else {}
        return as_list(await function(input.state.args, input.sample, input.sampling_params, **keywords))

    return call

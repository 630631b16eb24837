"""Generate functions of every documented form, called alike."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from miles.core.types.rollout import GenerateFnInput, GenerateFnOutput
from miles.core.types.sample import Sample

One = Callable[[GenerateFnInput], Awaitable[GenerateFnOutput]]
Together = Callable[[Sequence[GenerateFnInput]], Awaitable[list[GenerateFnOutput]]]


@dataclass(frozen=True, slots=True)
class Generator:
    """A generate function."""

    one: One
    """Makes the samples of one execution."""
    together: Together | None = None
    """Makes the samples of a group at once, where the function has a method of that name: it saves requests."""
    resumes: bool = False
    """Goes on with a sample that has tokens already, where the function has an attribute of that name."""


def adapt(function: Any, args: Any = None) -> Generator:
    """Accept ``(input)``, a class of such, and the older ``(args, sample, sampling_params[, evaluation])``.

    A class is constructed with ``args`` if its constructor takes a parameter.
    """
    if inspect.isclass(function):
        function = _construct(function, args)
    parameters = list(inspect.signature(function).parameters.values())
    if len(parameters) >= 3 and parameters[0].name != "input":
        return Generator(_legacy(function, any(parameter.name == "evaluation" for parameter in parameters)))
    return Generator(
        _one_argument(function), getattr(function, "together", None), resumes=getattr(function, "resumes", False)
    )


def as_list(samples: Sample | list[Sample]) -> list[Sample]:
    """One sample as a list of it."""
    return samples if isinstance(samples, list) else [samples]


def _construct(cls: Any, args: Any) -> Any:
    return cls(args) if inspect.signature(cls).parameters else cls()


def _one_argument(function: Any) -> One:
    async def call(input: GenerateFnInput) -> GenerateFnOutput:
        output: GenerateFnOutput = await function(input)
        return output

    return call


def _legacy(function: Any, takes_evaluation: bool) -> One:
    async def call(input: GenerateFnInput) -> GenerateFnOutput:
        keywords = {"evaluation": input.evaluation} if takes_evaluation else {}
        return GenerateFnOutput(await function(input.state.args, input.sample, input.sampling_params, **keywords))

    return call

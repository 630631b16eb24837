"""Generate functions of every documented form, called alike."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from miles.core.types.rollout import GenerateFnInput, GenerateFnOutput
from miles.core.types.sample import Sample

GenerateCall = Callable[[GenerateFnInput], Awaitable[list[Sample]]]
"""Makes the samples of one execution: one, or several when the function returns a list."""


def adapt(function: Any) -> GenerateCall:
    """Accept ``(input)``, a class of such, and the older ``(args, sample, sampling_params[, evaluation])``."""
    if inspect.isclass(function):
        return _one_argument(function())
    parameters = list(inspect.signature(function).parameters.values())
    if len(parameters) >= 3 and parameters[0].name != "input":
        return _legacy(function, any(parameter.name == "evaluation" for parameter in parameters))
    return _one_argument(function)


def _one_argument(function: Any) -> GenerateCall:
    async def call(input: GenerateFnInput) -> list[Sample]:
        output: GenerateFnOutput = await function(input)
        return _as_list(output.samples)

    return call


def _legacy(function: Any, takes_evaluation: bool) -> GenerateCall:
    async def call(input: GenerateFnInput) -> list[Sample]:
        keywords = {"evaluation": input.evaluation} if takes_evaluation else {}
        return _as_list(await function(input.state.args, input.sample, input.sampling_params, **keywords))

    return call


def _as_list(samples: Sample | list[Sample]) -> list[Sample]:
    return samples if isinstance(samples, list) else [samples]

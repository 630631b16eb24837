from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from miles.core.types.rollout import GenerateFnInput, GenerateFnOutput
from miles.core.types.sample import Sample
from miles.rollout.generators.adapt import adapt


def make_input(evaluation: bool = False) -> GenerateFnInput:
    return GenerateFnInput(SimpleNamespace(args="the args"), Sample(prompt="p"), {"temperature": 1.0}, evaluation)


async def test_a_function_of_one_argument() -> None:
    async def generate(input: GenerateFnInput) -> GenerateFnOutput:
        return GenerateFnOutput([input.sample, input.sample])

    given = make_input()
    assert (await adapt(generate).one(given)).samples == [given.sample, given.sample]


async def test_a_class_of_such_functions() -> None:
    class Generate:
        async def __call__(self, input: GenerateFnInput) -> GenerateFnOutput:
            return GenerateFnOutput(input.sample)

    given = make_input()
    assert (await adapt(Generate).one(given)).samples is given.sample


async def test_the_older_form() -> None:
    seen: list[Any] = []

    async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
        seen.append((args, sample.prompt, sampling_params))
        return sample

    given = make_input()
    assert (await adapt(generate).one(given)).samples is given.sample
    assert seen == [("the args", "p", {"temperature": 1.0})]


async def test_the_older_form_hears_of_evaluation_if_it_asks() -> None:
    async def generate(args: Any, sample: Sample, sampling_params: Any, evaluation: bool = False) -> list[Sample]:
        return [sample] if evaluation else []

    given = make_input(evaluation=True)
    assert (await adapt(generate).one(given)).samples == [given.sample]


async def test_a_first_parameter_called_input_is_the_one_argument_form() -> None:
    async def generate(input: GenerateFnInput, depth: int = 0, width: int = 0) -> GenerateFnOutput:
        return GenerateFnOutput(input.sample)

    given = make_input()
    assert (await adapt(generate).one(given)).samples is given.sample


async def test_a_class_whose_constructor_takes_a_parameter_is_given_the_flags() -> None:
    class Generate:
        def __init__(self, args: Any) -> None:
            self.args = args

        async def __call__(self, input: GenerateFnInput) -> GenerateFnOutput:
            return GenerateFnOutput([input.sample] if self.args == "the flags" else [])

    given = make_input()
    assert (await adapt(Generate, "the flags").one(given)).samples == [given.sample]


def test_a_method_for_groups_is_found() -> None:
    class Generate:
        async def __call__(self, input: GenerateFnInput) -> GenerateFnOutput:
            return GenerateFnOutput(input.sample)

        async def together(self, inputs: list[GenerateFnInput]) -> list[GenerateFnOutput]:
            return [GenerateFnOutput(input.sample) for input in inputs]

    async def plain(input: GenerateFnInput) -> GenerateFnOutput:
        return GenerateFnOutput(input.sample)

    assert adapt(Generate).together is not None
    assert adapt(plain).together is None

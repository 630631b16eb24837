from __future__ import annotations

import pytest

from miles.core.tools.schema import find, problem_with, typed_arguments

FUNCTION = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "when": {}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": FUNCTION}]


def test_a_function_is_found_by_name_with_and_without_the_outer_part() -> None:
    assert find("weather", TOOLS) == find("weather", [FUNCTION]) == FUNCTION
    assert find("clock", TOOLS) is None


@pytest.mark.parametrize(
    "arguments", [{"city": "Paris"}, {"city": "Rome", "days": 2}, {"city": "", "days": 2.0, "when": []}]
)
def test_calls_that_can_be_made(arguments: dict[str, object]) -> None:
    assert problem_with(arguments, FUNCTION) is None


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "missing city"),
        ({"city": "x", "dayz": 1}, "unknown dayz; there are city, days, when"),
        ({"city": 3}, "city must be of type string, found 3"),
        ({"city": "x", "days": True}, "days must be of type integer"),
        ({"city": "x", "days": 1.5}, "days must be of type integer"),
    ],
)
def test_calls_that_cannot(arguments: dict[str, object], problem: str) -> None:
    assert problem in str(problem_with(arguments, FUNCTION))


def test_a_function_without_parameters_takes_anything() -> None:
    assert problem_with({"x": 1}, {"name": "f"}) is None


def test_text_becomes_what_the_schema_says() -> None:
    written = {"city": "12", "days": "3", "when": '["now"]', "else": "words"}
    assert typed_arguments("weather", written, TOOLS) == {"city": "12", "days": 3, "when": ["now"], "else": "words"}

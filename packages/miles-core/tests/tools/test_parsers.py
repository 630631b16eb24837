from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.core.protocols.tools import ToolCall, ToolCallParser, ToolTurn
from miles.core.registry import Registry
from miles.core.tools import parsers

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {"type": "array"}},
            },
        },
    }
]
PARIS = ToolCall("weather", {"city": "Paris", "days": 3})
CLOCK = ToolCall("clock", {})

WRITTEN: list[tuple[str, str, ToolTurn]] = [
    (
        "hermes",
        'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>\n'
        '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
        ToolTurn("Let me look.", (PARIS, CLOCK)),
    ),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Paris", "days": 3}}', ToolTurn("", (PARIS,))),
    (
        "hermes",
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\", \\"days\\": 3}"}</tool_call>',
        ToolTurn("", (PARIS,)),
    ),
    ("hermes", '<tool_call>{"name": "clock"}</tool_call>', ToolTurn("", (CLOCK,))),
    (
        "llama3",
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Paris", "days": 3}}; {"name": "clock", '
        '"parameters": {}}',
        ToolTurn("", (PARIS, CLOCK)),
    ),
    (
        "llama3",
        '{"name": "weather", "parameters": {"city": "Paris", "days": 3}}',
        ToolTurn("", (PARIS,)),
    ),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris", "days": 3}}, {"name": "clock", '
        '"arguments": {}}]',
        ToolTurn("", (PARIS, CLOCK)),
    ),
    (
        "mistral",
        'Sure.[TOOL_CALLS]weather[ARGS]{"city": "Paris", "days": 3}[TOOL_CALLS]clock[CALL_ID]ab12[ARGS]{}',
        ToolTurn("Sure.", (PARIS, CLOCK)),
    ),
    (
        "deepseek",
        "I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Paris", "days": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n'
        "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ToolTurn("I look.", (PARIS, CLOCK)),
    ),
    (
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        '{"city": "Paris", "days": 3}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>clock<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ToolTurn("", (PARIS, CLOCK)),
    ),
    (
        "kimi",
        "Hm.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        '{"city": "Paris", "days": 3}<|tool_call_end|><|tool_call_begin|>functions.clock:1'
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        ToolTurn("Hm.", (PARIS, CLOCK)),
    ),
    ("pythonic", "[weather(city='Paris', days=3), clock()]", ToolTurn("", (PARIS, CLOCK))),
    ("pythonic", "<|python_start|>[weather(city='Paris', days=3)]<|python_end|>", ToolTurn("", (PARIS,))),
    (
        "pythonic",
        "[f(a=[1, {'b': None}], c=true, d=-2.5)]",
        ToolTurn("", (ToolCall("f", {"a": [1, {"b": None}], "c": True, "d": -2.5}),)),
    ),
    (
        "glm",
        "Wait.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call><tool_call>clock</tool_call>",
        ToolTurn("Wait.", (PARIS, CLOCK)),
    ),
    (
        "qwen3_coder",
        "So:\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=clock>\n</function>\n</tool_call>",
        ToolTurn("So:", (PARIS, CLOCK)),
    ),
]


def parser(name: str) -> ToolCallParser:
    found: ToolCallParser = getattr(parsers, name)
    return found


@pytest.mark.parametrize(("name", "text", "expected"), WRITTEN)
def test_calls_in_every_format(name: str, text: str, expected: ToolTurn) -> None:
    assert parser(name)(text, TOOLS) == expected


FORMATS = ("hermes", "llama3", "mistral", "deepseek", "kimi", "pythonic", "glm", "qwen3_coder")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("text", ["", "The answer is 42.", "[1, 2] and {3}", 'Say {"x": 1}.', "f(x) = [g(x)]"])
def test_plain_words_are_no_call(name: str, text: str) -> None:
    assert parser(name)(text, TOOLS) == ToolTurn(text)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": </tool_call>', "not JSON"),
        ("hermes", "<tool_call>[1]</tool_call>", 'object with a "name"'),
        ("hermes", '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>', "must be an object"),
        ("hermes", '<tool_call>{"name": "weather", "arguments": "x"}</tool_call>', "arguments are not JSON"),
        ("llama3", '{"name": "weather", "parameters": {"city"', "not JSON"),
        ("llama3", "<|python_tag|>print(1)", "not JSON"),
        ("mistral", '[TOOL_CALLS] [{"name": "weather"', "list of calls"),
        ("mistral", "[TOOL_CALLS] ?", "expected a name"),
        ("mistral", '[TOOL_CALLS]weather[ARGS]{"city"', "arguments are not JSON"),
        ("deepseek", "<｜tool▁call▁begin｜>weather<｜tool▁call▁end｜>", "expected a name"),
        ("deepseek", "<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{x<｜tool▁call▁end｜>", "arguments are not JSON"),
        ("kimi", "<|tool_call_begin|>weather<|tool_call_end|>", "expected functions.NAME"),
        ("kimi", "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{<|tool_call_end|>", "not JSON"),
        ("pythonic", "[weather(city='Paris'", "not a list of calls"),
        ("pythonic", "[weather('Paris')]", "by name"),
        ("pythonic", "[weather(city=open('x'))]", "plain values"),
        ("glm", "<tool_call>two words</tool_call>", "expected a name"),
        ("glm", "<tool_call>f<arg_key>a</arg_key></tool_call>", "a key has no value"),
        ("qwen3_coder", "<tool_call>weather</tool_call>", "expected <function=NAME>"),
    ],
)
def test_a_malformed_call_says_what_is_wrong(name: str, text: str, problem: str) -> None:
    calls = parser(name)(text, TOOLS).calls
    assert len(calls) == 1
    assert calls[0].problem is not None
    assert problem in calls[0].problem


def test_a_broken_call_does_not_hide_the_good_one_beside_it() -> None:
    text = '<tool_call>{oops</tool_call><tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    broken, good = parsers.hermes(text, TOOLS).calls
    assert broken.problem is not None
    assert good == CLOCK


def test_text_after_json_calls_is_a_problem_of_its_own() -> None:
    first, second = parsers.llama3('{"name": "clock", "parameters": {}} and so on', TOOLS).calls
    assert (first, second.problem is None) == (CLOCK, False)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
names = st.from_regex(r"[a-z_][a-z0-9_]{0,10}", fullmatch=True)


@given(names, st.dictionaries(names, values, max_size=3))
def test_json_formats_give_back_what_was_written(name: str, arguments: dict[str, Any]) -> None:
    body = json.dumps({"name": name, "arguments": arguments})
    plain = json.dumps(arguments)
    for text, parse in (
        (f"<tool_call>\n{body}\n</tool_call>", parsers.hermes),
        (f"<|python_tag|>{body}", parsers.llama3),
        (f"[TOOL_CALLS] [{body}]", parsers.mistral),
        (f"[TOOL_CALLS]{name}[ARGS]{plain}", parsers.mistral),
        (f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{plain}<｜tool▁call▁end｜>", parsers.deepseek),
        (f"<|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>{plain}<|tool_call_end|>", parsers.kimi),
    ):
        assert parse(text, []).calls == (ToolCall(name, arguments),)


@given(st.text(alphabet='<>/_abct{}[]"=(),;:| \n', max_size=60), st.sampled_from(FORMATS))
def test_no_text_breaks_a_parser(text: str, name: str) -> None:
    for marked in (text, f"<tool_call>{text}", f"[TOOL_CALLS]{text}", f"<|python_tag|>{text}", f"[f({text})]"):
        for call in parser(name)(marked, TOOLS).calls:
            assert call.problem is not None or call.name


def test_every_format_is_registered_under_the_names_users_know() -> None:
    registry = Registry("miles.tool_parsers")
    for name in ("hermes", "qwen", "qwen25", "qwen3_coder", "llama3", "mistral", "deepseekv3", "pythonic", "glm45"):
        assert callable(registry.get(name))

"""What a model said, taken apart."""

from __future__ import annotations

import pytest
from chat_templates import CHATML, GLM, LLAMA3

from miles.core.errors import PluginError
from miles.router.sessions.speech import Listener

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


def test_words_and_calls_are_parted_as_the_template_shows_them():
    spoken = Listener("auto", CHATML, reasoning=True)("I add. " + CALL, TOOLS)
    assert spoken.words == "I add."
    assert [(call.name, call.arguments) for call in spoken.calls] == [("add", {"a": 1})]


def test_malformed_calls_stay_words():
    text = CALL + "<tool_call>{</tool_call>"
    assert Listener("hermes", "", reasoning=True)(text, TOOLS).words == text


def test_without_tools_or_without_a_parser_nothing_is_a_call():
    assert Listener("hermes", "", reasoning=True)(CALL, None).words == CALL
    assert Listener("none", CHATML, reasoning=True)(CALL, TOOLS).words == CALL
    assert Listener("auto", "no tools here", reasoning=True)(CALL, TOOLS).words == CALL


def test_most_telling_mark_of_a_template_counts():
    glm = Listener("auto", GLM + "<arg_key>", reasoning=True)
    text = "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
    assert glm(text, TOOLS).calls[0].arguments == {"a": 1}
    llama = Listener("auto", LLAMA3 + "<|python_tag|>", reasoning=True)
    assert llama('{"name": "add", "parameters": {"a": 1}}', TOOLS).calls[0].name == "add"


def test_reasoning_is_parted_from_words():
    listen = Listener("none", "", reasoning=True)
    assert listen("<think>\nhm\n</think>\n\nyes", None).reasoning == "hm"
    assert listen("hm\n</think>\n\nyes", None) == listen("<think>hm</think>yes", None)
    assert listen("<think>\nstill at it", None).reasoning == "still at it"
    assert listen("<think>\nstill at it", None).words == ""
    assert listen("yes", None).reasoning is None
    assert Listener("none", "", reasoning=False)("<think>a</think>b", None).words == "<think>a</think>b"


def test_unknown_parser_is_named():
    with pytest.raises(PluginError, match="hermess"):
        Listener("hermess", "", reasoning=True)

"""OpenAI messages: brought into one form, compared, refused."""

from __future__ import annotations

import pytest

from miles.router.sessions.messages import BadMessageError, read_messages, same

USER = {"role": "user", "content": "hi"}


def call(name="f", arguments='{"a": 1}', **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | more


def test_forms_of_content_become_text():
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    (message,) = read_messages([parts])
    assert message["content"] == "ab"
    first, _ = read_messages([{"role": "assistant", "content": None, "name": None}, USER])
    assert first == {"role": "assistant", "content": ""}


def test_arguments_of_calls_become_objects():
    first, _ = read_messages([{"role": "assistant", "tool_calls": [call(id="1"), call(arguments={"b": 2})]}, USER])
    assert first["tool_calls"] == [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
        {"type": "function", "function": {"name": "f", "arguments": {"b": 2}}},
    ]
    assert read_messages([{"role": "assistant", "tool_calls": []}, USER])[0] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (None, "'messages' must be a list"),
        ([], "at least one"),
        (["hi"], r"messages\[0\] must be an object"),
        ([{"role": "robot", "content": ""}], "role 'robot'"),
        ([{"role": "assistant", "content": "a"}], "nothing to answer"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "parts of type 'text'"),
        ([{"role": "user", "content": 3}], "content must be text"),
        ([{"role": "assistant", "tool_calls": ["x"]}, USER], "'function' with a 'name'"),
        ([{"role": "assistant", "tool_calls": [call(arguments="{")]}, USER], "arguments of 'f' are not JSON"),
    ],
)
def test_mistakes_are_named(messages, problem):
    with pytest.raises(BadMessageError, match=problem):
        read_messages(messages)


def test_what_is_the_same():
    stored = {"role": "assistant", "content": "a", "reasoning_content": "hm", "tool_calls": [call(arguments={"a": 1})]}
    assert same(stored, stored)
    assert same(stored, {name: value for name, value in stored.items() if name != "reasoning_content"})
    assert same({"role": "user", "content": ""}, {"role": "user"})
    assert not same(stored, stored | {"reasoning_content": "other"})
    assert not same(stored, stored | {"content": "b"})
    assert not same(stored, stored | {"tool_calls": [call(arguments={"a": 2})]})
    assert not same(stored, stored | {"role": "user"})

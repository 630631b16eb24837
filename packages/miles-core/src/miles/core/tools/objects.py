"""Calls written as JSON objects."""

from __future__ import annotations

import json
from typing import Any

from miles.core.protocols.tools import ToolCall

_ARGUMENT_KEYS = ("arguments", "parameters")
_SHOWN_CHARS = 200
_DECODER = json.JSONDecoder()


def read_call(text: str) -> ToolCall:
    """The call ``{"name": ..., "arguments" or "parameters": {...}}``."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return malformed(text, f"it is not JSON: {error}")
    return call_of(value)


def call_of(value: Any) -> ToolCall:
    """The call that a parsed object states."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return malformed(json.dumps(value), 'expected an object with a "name" and "arguments"')
    key = next((key for key in _ARGUMENT_KEYS if key in value), None)
    return named_call(value["name"], {} if key is None else value[key])


def named_call(name: str, arguments: Any) -> ToolCall:
    """A call of ``name``; ``arguments`` are an object, or JSON text of one."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            return malformed(arguments, f"the arguments are not JSON: {error}", name)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return malformed(json.dumps(arguments), "the arguments must be an object", name)
    return ToolCall(name, arguments)


def read_objects(text: str) -> tuple[list[Any], str]:
    """JSON values at the beginning of ``text``, divided by ``;``, ``,`` or space, and what follows them."""
    values = []
    while text := text.lstrip("; ,\n\t\r"):
        try:
            value, end = _DECODER.raw_decode(text)
        except ValueError:
            break
        values.append(value)
        text = text[end:]
    return values, text


def malformed(text: str, why: str, name: str = "") -> ToolCall:
    """A call that cannot be executed; ``why`` says what is wrong with ``text``."""
    shown = text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."
    return ToolCall(name, {}, f"{why} (found {shown!r})")

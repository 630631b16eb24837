"""OpenAI messages: brought into one form, and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from miles.core.continuation import Message

ROLES = frozenset(("system", "developer", "user", "assistant", "tool"))


class BadMessageError(ValueError):
    """A request's messages are not what OpenAI's protocol says, or do not continue the session."""


def read_messages(value: Any) -> list[Message]:
    """Messages as templates take them: text contents, arguments of tool calls as objects.  Raises BadMessageError."""
    if not isinstance(value, list) or not value:
        raise BadMessageError("'messages' must be a list with at least one message")
    messages = [_read(number, message) for number, message in enumerate(value)]
    if messages[-1]["role"] == "assistant":
        raise BadMessageError("the last message is the assistant's: there is nothing to answer")
    return messages


def same(stored: Message, given: Message) -> bool:
    """Whether ``given`` repeats ``stored``.  Absent, null and empty are equal; reasoning may be left out."""
    return (
        stored["role"] == given["role"]
        and (stored.get("content") or "") == (given.get("content") or "")
        and given.get("reasoning_content") in (None, "", stored.get("reasoning_content"))
        and _calls(stored) == _calls(given)
    )


def _read(number: int, message: Any) -> Message:
    where = f"messages[{number}]"
    if not isinstance(message, Mapping):
        raise BadMessageError(f"{where} must be an object")
    role = message.get("role")
    if role not in ROLES:
        raise BadMessageError(f"{where}: role {role!r} is not one of {', '.join(sorted(ROLES))}")
    read: Message = {name: value for name, value in message.items() if value is not None}
    read["content"] = _text(where, message.get("content"))
    if message.get("tool_calls"):
        read["tool_calls"] = [_call(where, call) for call in message["tool_calls"]]
    else:
        read.pop("tool_calls", None)
    return read


def _text(where: str, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    raise BadMessageError(f"{where}: content must be text, or a list of parts of type 'text'")


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadMessageError(f"{where}: a tool call must have a 'function' with a 'name'")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise BadMessageError(f"{where}: the arguments of {function['name']!r} are not JSON") from None
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _calls(message: Message) -> list[tuple[str, Any]]:
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    return [(function["name"], function["arguments"]) for function in functions]

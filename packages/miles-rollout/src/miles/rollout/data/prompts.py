"""From a row of a data file to a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from miles.rollout.data.files import Row
from miles.rollout.multimodal import Media, read_media, with_placeholders

if TYPE_CHECKING:
    from miles.rollout.text import ChatTokenizer

Messages = list[dict[str, Any]]
"""OpenAI messages: ``{"role": ..., "content": ...}``."""
PromptText = str | Messages


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row, ready to become a group of samples."""

    text: PromptText
    """Text, or messages when no chat template was applied."""
    label: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    media: Media | None = None


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """Which keys of a row hold what, and how a prompt is written.  Fields are named after their flags."""

    input_key: str = "input"
    label_key: str | None = None
    metadata_key: str = "metadata"
    tool_key: str = "tools"
    apply_chat_template: bool = False
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    multimodal_keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> set[str]:
        """Keys that are read."""
        keys = (self.input_key, self.label_key, self.metadata_key, self.tool_key, *self.multimodal_keys.values())
        return {key for key in keys if key}

    def read(self, row: Row) -> Prompt:
        """The prompt before any chat template; ValueError says what is wrong with the row."""
        metadata = dict(_metadata(row.get(self.metadata_key), self.metadata_key))
        tools = _tools(row.get(self.tool_key), self.tool_key)
        if tools is not None:
            metadata["tools"] = tools
        media = read_media(row, self.multimodal_keys)
        text = self._input(row)
        if media is not None:
            text = with_placeholders(text if isinstance(text, list) else _user_message(text), media)
        return Prompt(text, self._label(row), metadata, media)

    def render(self, prompt: Prompt, tokenizer: ChatTokenizer | None) -> Prompt:
        """Apply the chat template if it is wanted; ValueError when the template refuses the messages."""
        if not self.apply_chat_template:
            return prompt
        assert tokenizer is not None, "a chat template needs a tokenizer"
        messages = prompt.text if isinstance(prompt.text, list) else _user_message(prompt.text)
        text = tokenizer.render(messages, tools=prompt.metadata.get("tools"), **self.chat_template_kwargs)
        return Prompt(text, prompt.label, prompt.metadata, prompt.media)

    def _input(self, row: Row) -> PromptText:
        if self.input_key not in row:
            raise ValueError(f"--input-key {self.input_key!r} is missing; the row has {sorted(row)}")
        value = row[self.input_key]
        if isinstance(value, str):
            return value
        problem = _message_problem(value)
        if problem is not None:
            raise ValueError(f"{self.input_key!r} must be text or a list of messages: {problem}")
        return list(value)

    def _label(self, row: Row) -> Any:
        if self.label_key is None:
            return None
        if self.label_key not in row:
            raise ValueError(f"--label-key {self.label_key!r} is missing; the row has {sorted(row)}")
        return row[self.label_key]


def _user_message(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _message_problem(value: Any) -> str | None:
    if not isinstance(value, list) or not value:
        return f"found {type(value).__name__}" if not isinstance(value, list) else "the list is empty"
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            return f"message {number} is {type(message).__name__}, expected an object"
        if not isinstance(message.get("role"), str):
            return f"message {number} has no 'role'"
        if "content" not in message and "tool_calls" not in message:
            return f"message {number} has no 'content'"
    return None


def _metadata(value: Any, key: str) -> dict[str, Any]:
    value = _decoded(value, key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"--metadata-key {key!r} must hold an object, found {type(value).__name__}")
    return value


def _tools(value: Any, key: str) -> list[Any] | None:
    value = _decoded(value, key)
    if value is None:
        return None
    if not isinstance(value, list):
        raise ValueError(f"--tool-key {key!r} must hold a list of tools, found {type(value).__name__}")
    return value


def _decoded(value: Any, key: str) -> Any:
    """Columns of nested data often come as JSON text, in Parquet above all."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{key!r} is text that is not JSON ({error})") from error

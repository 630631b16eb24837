"""Tokenizer and chat template of a checkpoint: ``tokenizer.json`` and Jinja, without transformers."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from miles.core.errors import ConfigError

Message = dict[str, Any]

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class TemplateRefusalError(ValueError):
    """The chat template cannot write these messages."""


class ChatTemplate:
    """Writes conversations as text, and text as token ids, exactly as the checkpoint in ``directory`` wants them.

    ``variables`` are those of every rendering, like ``enable_thinking``.  Raises ConfigError when a file is missing.
    """

    def __init__(self, directory: Path, template_file: Path | None, variables: Mapping[str, Any]) -> None:
        self._tokenizer = _read_tokenizer(directory)
        settings = _read_settings(directory)
        specials = {name: _content(settings[name]) for name in _SPECIAL_NAMES if settings.get(name) is not None}
        self._variables = specials | dict(variables)
        sources = _template_sources(directory, template_file, settings)
        self.source = sources.get("tool_use", sources["default"])
        """Jinja text of the template, the one for conversations with tools if there are two."""
        self._plain, self._with_tools = _compile(directory, sources)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        """Ids that no text can produce, and that text around them is never merged with."""
        special_texts = [re.escape(token.content) for token in added.values() if token.special]
        self._special_text = re.compile("|".join(sorted(special_texts, key=len, reverse=True)) or "(?!)")

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: list[Any] | None = None,
        prompt: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text; with ``prompt``, ready for the assistant's answer.  Raises TemplateRefusalError."""
        template = self._with_tools if tools else self._plain
        context = self._variables | dict(variables or {})
        try:
            text: str = template.render(messages=messages, tools=tools, add_generation_prompt=prompt, **context)
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise TemplateRefusalError(f"the chat template refuses the messages: {error}") from error
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` as it stands."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens included."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def piece(self, token_id: int) -> str:
        """Text of one token."""
        return self.decode([token_id])

    def without_specials(self, text: str) -> str:
        """``text`` less the special tokens written out in it."""
        return self._special_text.sub("", text)


class _Generation(Extension):
    """``{% generation %}``: marks what an assistant says for others; here its content is written like any other."""

    tags = {"generation"}  # noqa: RUF012  declared so by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(directory: Path, sources: Mapping[str, str]) -> tuple[jinja2.Template, jinja2.Template]:
    """The template, and the one for conversations with tools."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = time.strftime
    try:
        plain = environment.from_string(sources["default"])
        return plain, environment.from_string(sources["tool_use"]) if "tool_use" in sources else plain
    except jinja2.TemplateError as error:
        raise ConfigError(f"--session-tokenizer {directory}: the chat template cannot be read: {error}") from error


def _template_sources(directory: Path, template_file: Path | None, settings: Mapping[str, Any]) -> dict[str, str]:
    if template_file is not None:
        try:
            return {"default": template_file.read_text(encoding="utf-8")}
        except OSError as error:
            raise ConfigError(f"--session-chat-template {template_file}: {error.strerror}") from error
    own = directory / "chat_template.jinja"
    if own.exists():
        return {"default": own.read_text(encoding="utf-8")}
    known = settings.get("chat_template")
    if isinstance(known, str):
        return {"default": known}
    if isinstance(known, list):
        named = {entry["name"]: entry["template"] for entry in known}
        if "default" in named:
            return named
    raise ConfigError(
        f"--session-tokenizer {directory}: it has no chat template (chat_template.jinja, or 'chat_template' in "
        "tokenizer_config.json); give one with --session-chat-template FILE"
    )


def _read_tokenizer(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.exists():
        found = sorted(file.name for file in directory.iterdir()) if directory.is_dir() else "no such directory"
        raise ConfigError(f"--session-tokenizer {directory}: expected a tokenizer.json in it ({found})")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise ConfigError(f"--session-tokenizer {directory}: tokenizer.json cannot be read: {error}") from error


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ConfigError(f"--session-tokenizer {directory}: tokenizer_config.json is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"--session-tokenizer {directory}: tokenizer_config.json must be a JSON object")
    return settings


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As templates are written for: no escapes of HTML, no ASCII."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)

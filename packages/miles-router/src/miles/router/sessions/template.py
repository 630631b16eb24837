"""The chat template of a checkpoint, without transformers."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from miles.core.continuation import Message, TemplateRefusalError
from miles.core.errors import ConfigError
from miles.router.tokenizer import CheckpointTokenizer

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class ChatTemplate:
    """Writes conversations as the checkpoint of ``tokenizer`` wants them.

    ``variables`` are those of every rendering, like ``enable_thinking``.  Raises ConfigError when there is no template.
    """

    def __init__(
        self, tokenizer: CheckpointTokenizer, template_file: Path | None, variables: Mapping[str, Any]
    ) -> None:
        settings = tokenizer.settings
        self.tokenizer = tokenizer
        self.encode = tokenizer.encode
        self.special_ids = tokenizer.special_ids
        specials = {name: _content(settings[name]) for name in _SPECIAL_NAMES if settings.get(name) is not None}
        self._variables = specials | dict(variables)
        sources = _template_sources(tokenizer.directory, template_file, settings)
        self.source = sources.get("tool_use", sources["default"])
        """Jinja text of the template, the one for conversations with tools if there are two."""
        self._plain, self._with_tools = _compile(tokenizer.directory, sources)

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
        raise ConfigError(f"--tokenizer {directory}: the chat template cannot be read: {error}") from error


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
        f"--tokenizer {directory}: it has no chat template (chat_template.jinja, or 'chat_template' in "
        "tokenizer_config.json); give one with --session-chat-template FILE"
    )


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

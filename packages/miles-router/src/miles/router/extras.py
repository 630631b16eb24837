"""What needs the packages of ``miles-router[sessions]``: imported only when a flag asks for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from miles.core.continuation import Continuation, TemplateRefusalError
from miles.core.errors import ConfigError
from miles.router.dispatcher import Dispatcher
from miles.router.settings import Settings

if TYPE_CHECKING:
    from miles.router.sessions.service import SessionService
    from miles.router.tokenizer import CheckpointTokenizer


def load_tokenizer(settings: Settings, wanted_by: str) -> CheckpointTokenizer:
    """The tokenizer of ``--tokenizer``; raises ConfigError."""
    if settings.tokenizer is None:
        raise ConfigError(f"{wanted_by} needs --tokenizer DIR: the checkpoint that the workers serve")
    try:
        from miles.router.tokenizer import CheckpointTokenizer
    except ModuleNotFoundError as error:
        raise _missing(wanted_by, error) from error
    return CheckpointTokenizer(settings.tokenizer)


def prepare_sessions(settings: Settings) -> Callable[[Dispatcher], SessionService]:
    """Check what ``--sessions`` needs; what is returned makes the service once there is a dispatcher."""
    tokenizer = load_tokenizer(settings, "--sessions")
    try:
        from miles.router.sessions.service import SessionService
        from miles.router.sessions.speech import Listener
        from miles.router.sessions.template import ChatTemplate
    except ModuleNotFoundError as error:
        raise _missing("--sessions", error) from error
    template = ChatTemplate(tokenizer, settings.session_chat_template, settings.session_template_kwargs)
    reasoning = settings.session_reasoning == "auto"
    listener = Listener(settings.session_tool_parser, template.source, reasoning=reasoning)
    try:
        continuation = Continuation(template)
    except TemplateRefusalError as error:
        raise ConfigError(f"--sessions: the chat template cannot be used for sessions: {error}") from error
    return partial(SessionService, settings, template, continuation, listener)


def _missing(flag: str, error: ModuleNotFoundError) -> ConfigError:
    return ConfigError(f"{flag} needs {error.name}, which is not installed: pip install 'miles-router[sessions]'")

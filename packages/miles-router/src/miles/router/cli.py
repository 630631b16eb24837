"""``miles-router``: the router as a program."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

import uvloop
from pydantic import ValidationError
from pydantic.fields import FieldInfo

import miles.router
from miles.core.errors import ConfigError, PluginError
from miles.router.process import keep_freed_memory, raise_file_limit
from miles.router.server import RouterServer, listen
from miles.router.settings import Settings

_ALIASES = {
    "request_timeout_s": "--miles-router-timeout",
    "max_connections": "--miles-router-max-connections",
    "health_check_failure_threshold": "--miles-router-health-check-failure-threshold",
    "health_check_interval_s": "--rollout-health-check-interval",
    "middleware": "--miles-router-middleware-paths",
}
"""The same settings as a run's flags spell them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a router until SIGTERM; 2 when it cannot start as told."""
    try:
        settings = parse_settings(arguments)
        server = RouterServer(settings)
        listener = listen(settings)
    except (ConfigError, PluginError) as error:
        print(f"miles-router: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    raise_file_limit()
    keep_freed_memory()
    scheme = "https" if settings.tls_certificate else "http"
    address = f"{scheme}://{authority(*listener.getsockname()[:2])}"

    def announce() -> None:
        print(f"miles-router {miles.router.__version__} on {address}", flush=True)

    try:
        with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server.serve(listener, announce))
    except ConfigError as error:  # of a middleware
        print(f"miles-router: {error}", file=sys.stderr)
        return 2
    return 0


def authority(host: str, port: int) -> str:
    """Host and port as they stand in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_settings(arguments: Sequence[str] | None) -> Settings:
    """Settings from a command line; raises ConfigError with every mistake at once."""
    parser = build_parser()
    given = vars(parser.parse_args(arguments))
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        raise ConfigError(*(_explain(problem) for problem in error.errors())) from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong, without the usage of some fifty flags above it."""
        self.exit(2, f"{self.prog}: {message}\n{self.prog} --help lists all flags\n")


def build_parser() -> argparse.ArgumentParser:
    """One flag for each field of Settings."""
    parser = _Parser(
        prog="miles-router",
        description="Streaming HTTP router in front of SGLang-compatible engines.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"miles-router {miles.router.__version__}")
    for name, field in Settings.model_fields.items():
        parser.add_argument(*_spellings(name), dest=name, **_options(name, field))
    return parser


def _spellings(name: str) -> list[str]:
    spellings = ["--" + name.replace("_", "-")]
    return [*spellings, _ALIASES[name]] if name in _ALIASES else spellings


def _options(name: str, field: FieldInfo) -> dict[str, Any]:
    text = (field.description or "").replace("%", "%%")
    if field.default == ():
        return {"nargs": "+", "action": "extend", "help": text, "metavar": "URL" if name == "worker" else "NAME"}
    if field.annotation is bool:
        return {"action": "store_true", "help": text}
    if field.default is not None and field.default_factory is None:
        text += f" (default: {field.default})"
    choices = get_args(field.annotation)
    if choices and all(isinstance(choice, str) for choice in choices):
        return {"help": text, "choices": choices}
    return {"help": text, "metavar": "VALUE"}


def _explain(problem: Any) -> str:
    location = problem["loc"]
    if not location:
        return str(problem["msg"]).removeprefix("Value error, ")
    return f"{_spellings(str(location[0]))[0]} {problem['input']!r}: {problem['msg']}"

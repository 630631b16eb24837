"""What contradicts what among the flags of conversations with tools.  Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from miles.core.errors import MilesError
from miles.core.flags.data import Data
from miles.rollout.flags import MultiTurn, Rollout, Sampling
from miles.rollout.tools.specs import load_tool_specs, names_file

if TYPE_CHECKING:
    from miles.core.config import Config

MULTI_TURN, AGENTIC = "multi_turn", "agentic"
_FLAGS = {
    "generate_max_turns": "--generate-max-turns",
    "generate_tool_specs_path": "--generate-tool-specs-path",
    "generate_tool_call_parser": "--generate-tool-call-parser",
    "generate_execute_tool_function_path": "--generate-execute-tool-function-path",
    "generate_tool_timeout": "--generate-tool-timeout",
    "generate_multi_samples": "--generate-multi-samples",
}


def check_multi_turn(config: Config) -> Iterator[str]:
    """The flags of the generator ``multi_turn`` are complete.  A generator of the user's may read any of them."""
    flags, generator = config[MultiTurn], config[Rollout].custom_generate_function_path
    given = [flag for name, flag in _FLAGS.items() if config.origin[name] != "default"]
    if generator is None and given:
        yield (
            f"{', '.join(given)}: no effect without a generator that converses; give --custom-generate-function-path "
            f"{MULTI_TURN}"
        )
    if generator != MULTI_TURN:
        return
    for flag, value in (
        ("--generate-tool-call-parser", flags.generate_tool_call_parser),
        ("--generate-execute-tool-function-path", flags.generate_execute_tool_function_path),
    ):
        if value is None:
            yield f"--custom-generate-function-path {MULTI_TURN} needs {flag}"
    if config[Sampling].partial_rollout and flags.generate_multi_samples:
        yield (
            "--generate-multi-samples does not go with --partial-rollout: a group that is given back must have "
            "--n-samples-per-prompt samples"
        )
    path = flags.generate_tool_specs_path
    if path is not None and names_file(path):
        yield from _problems_of_file(path)


def _problems_of_file(path: str) -> Iterator[str]:
    try:
        load_tool_specs(str(Path(path)))
    except MilesError as error:
        yield str(error)


def check_agent(config: Config) -> Iterator[str]:
    """The flags of the generator ``agentic`` go together."""
    agent, generator = config[MultiTurn].custom_agent_function_path, config[Rollout].custom_generate_function_path
    if generator == AGENTIC and agent is None:
        yield f"--custom-generate-function-path {AGENTIC} needs --custom-agent-function-path: the agent to run"
    if agent is not None and generator is None:
        yield f"--custom-agent-function-path has no effect without --custom-generate-function-path {AGENTIC}"
    if generator == AGENTIC and config[Data].apply_chat_template:
        yield (
            f"--apply-chat-template does not go with --custom-generate-function-path {AGENTIC}: an agent gets the "
            "messages, and the session applies the template. Leave it out"
        )


CHECKS: tuple[Callable[[Config], Iterator[str]], ...] = (check_multi_turn, check_agent)

"""``--sglang-*`` flags against the arguments of the installed server."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles.rollout.engines.sglang.environment import Argument

ENVIRONMENT_OPTIONS = frozenset({"python"})
"""Options of Miles' own: where the server is, not what it is told."""
SET_BY_MILES = {
    "model_path": "the engines load --hf-checkpoint",
    "tokenizer_path": "the engines load --hf-checkpoint",
    "host": "an engine listens where the run can reach it",
    "port": "every engine gets a free port",
    "random_seed": "it follows from --seed and the engine's number",
    "tp_size": "give --rollout-num-gpus-per-engine",
    "base_gpu_id": "it follows from --rollout-num-gpus-per-engine and the engine's number",
    "device": "give --device",
    "nnodes": "it follows from --rollout-num-gpus-per-engine and --num-gpus-per-node",
    "node_rank": "it follows from --rollout-num-gpus-per-engine and --num-gpus-per-node",
    "dist_init_addr": "the nodes of an engine meet where the first one is",
    "disaggregation_mode": "give --prefill-num-servers",
    "disaggregation_bootstrap_port": "every prefill server gets a free port",
    "dp_size": "replicas cannot take weights together; give more engines with --rollout-num-engines",
    "weight_version": "it counts the weight updates of the run",
    "custom_weight_loader": "the run loads weights through Miles' own",
    "skip_server_warmup": "engines are warmed up by the first rollout",
}
_SIZE = re.compile(r"\d+(\.\d+)?([kKmMgGtT]i?)?")


def spelling(name: str) -> str:
    """``tp_size`` -> ``--sglang-tp-size``."""
    return f"--sglang-{name.replace('_', '-')}"


def problems_with(options: Mapping[str, Any], arguments: Sequence[Argument]) -> list[str]:
    """Everything that the server would not take, and what Miles decides itself."""
    known = {flag.removeprefix("--").replace("-", "_"): argument for argument in arguments for flag in argument.flags}
    return [problem for name, value in options.items() for problem in _problems(name, value, known)]


def _problems(name: str, value: Any, known: Mapping[str, Argument]) -> Iterator[str]:
    argument = known.get(name)
    if argument is None:
        nearest = [full for full in known if full.startswith(f"{name}_")] or difflib.get_close_matches(name, known)
        hint = f". Did you mean {spelling(nearest[0])}?" if nearest else ""
        yield f"{spelling(name)}: the installed SGLang has no argument --{name.replace('_', '-')}{hint}"
        return
    names = {flag.removeprefix("--").replace("-", "_") for flag in argument.flags}
    for taken in names & SET_BY_MILES.keys():
        yield f"{spelling(name)} is set by Miles: {SET_BY_MILES[taken]}"
    expected = _expectation(argument)
    if not _fits(value, argument):
        yield f"{spelling(name)} {_shown(value)}: expected {expected}"


def _fits(value: Any, argument: Argument) -> bool:
    if argument.switch:
        return isinstance(value, bool)
    if isinstance(value, list) and not argument.several:
        return False
    values = value if isinstance(value, list) else [value]
    return all(_one_fits(one, argument) for one in values)


def _one_fits(value: Any, argument: Argument) -> bool:
    if value is True:
        return argument.several  # a bare flag: an empty list
    if argument.choices is not None:
        return str(value) in argument.choices
    if argument.type == "int":
        return type(value) is int
    if argument.type == "float":
        return type(value) in (int, float)
    if argument.type == "human_readable_int":
        return _SIZE.fullmatch(str(value)) is not None
    return argument.type != "loads" or _is_json(str(value))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _expectation(argument: Argument) -> str:
    if argument.switch:
        return "no value"
    words = {"int": "an integer", "float": "a number", "human_readable_int": "an integer such as 32768 or 32k"}
    one = words.get(argument.type, "JSON" if argument.type == "loads" else "a value")
    if argument.choices is not None:
        one = f"one of {', '.join(argument.choices)}"
    return f"a list, each {one}" if argument.several else one


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "" if value is True else str(value)


def arguments_of(options: Mapping[str, Any]) -> list[str]:
    """Command line of the server."""
    line: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            line.append(flag)
        elif isinstance(value, list):
            line += [flag, *map(str, value)]
        elif value is not None and value is not False:
            line += [flag, str(value)]
    return line

"""The command line: which flags were typed, as raw text."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from miles.core import plugins
from miles.core.config.discover import FlagTable
from miles.core.config.flag import FlagSpec

# Flags of packages that may be absent, by prefix or name, so that the error can say what to install.
_OWNERS_BY_PREFIX = {
    "--fsdp-": "miles-fsdp",
    "--megatron-": "miles-megatron",
    "--mtp-": "miles-megatron",
    "--miles-router-": "miles-router",
    "--rollout-": "miles-rollout",
    "--eval-": "miles-rollout",
    "--sglang-": "miles-rollout",
    "--generate-": "miles-rollout",
}
_OWNERS_BY_NAME = {
    "--gradient-checkpointing": "miles-fsdp",
    "--attn-implementation": "miles-fsdp",
    "--enable-mtp-training": "miles-megatron",
    "--use-miles-router": "miles-router",
    "--loss-mask-type": "miles-rollout",
    "--partial-rollout": "miles-rollout",
    "--over-sampling-batch-size": "miles-rollout",
    "--dynamic-sampling-filter-path": "miles-rollout",
    "--n-samples-per-eval-prompt": "miles-rollout",
}

_NUMBER = re.compile(r"[-+]?(\d+(_\d+)*|(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)")


@dataclass
class Parsed:
    """Raw texts by field name (a list where the flag takes several), and what could not be understood."""

    values: dict[str, Any] = field(default_factory=dict)
    captured: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Values of flags that a field collects, by that field's name."""
    problems: list[str] = field(default_factory=list)


def parse(flags: Sequence[str], table: FlagTable) -> Parsed:
    """Read a command line.  Nothing is converted or checked yet; a flag given twice keeps its last value."""
    parsed = Parsed()
    rest = _capture(list(flags), table, parsed)
    try:
        namespace, unknown = build_parser(table).parse_known_args(rest)
    except argparse.ArgumentError as error:
        parsed.problems.append(f"{error.argument_name}: {error.message}")
        return parsed
    parsed.values = vars(namespace)
    parsed.problems += _explain_unknown(unknown, table)
    return parsed


def build_parser(table: FlagTable) -> argparse.ArgumentParser:
    """The parser of all flags.  Every action stores text, so that a missing value cannot be mistaken for a default."""
    parser = _Parser(argument_default=argparse.SUPPRESS, allow_abbrev=False, add_help=False, exit_on_error=False)
    for spec in table.flags.values():
        if spec.flag.captures is None:
            _add(parser, spec)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def _add(parser: argparse.ArgumentParser, spec: FlagSpec) -> None:
    if spec.is_switch:
        parser.add_argument(spec.spelling, dest=spec.name, action="store_const", const=not spec.flag.negates)
        if opposite := opposite_spelling(spec):
            parser.add_argument(opposite, dest=spec.name, action="store_const", const=False)
    elif spec.is_list:
        parser.add_argument(spec.spelling, dest=spec.name, nargs="+")
    else:
        parser.add_argument(spec.spelling, dest=spec.name)


def opposite_spelling(spec: FlagSpec) -> str | None:
    """``--no-x`` of a switch ``--x``, which undoes what a file or a derivation sets; None where it would read badly."""
    if not spec.is_switch or spec.flag.negates or spec.spelling.startswith(("--no-", "--disable-")):
        return None
    return "--no-" + spec.spelling.removeprefix("--")


def _capture(tokens: list[str], table: FlagTable, parsed: Parsed) -> list[str]:
    """Take the flags that a field collects out of ``tokens``; return the others."""
    rest: list[str] = []
    position = 0
    while position < len(tokens):
        token = tokens[position]
        spelling, has_value, value = token.partition("=")
        position += 1
        collector = None if spelling in table.by_spelling else _collector(spelling, table)
        if collector is None:
            rest.append(token)
            continue
        values = [value] if has_value else []
        while not has_value and position < len(tokens) and not tokens[position].startswith("--"):
            values.append(tokens[position])
            position += 1
        prefix = collector.flag.captures or ""
        name = spelling.removeprefix(prefix).replace("-", "_")
        parsed.captured.setdefault(collector.name, {})[name] = _captured_value(values)
    return rest


def _collector(spelling: str, table: FlagTable) -> FlagSpec | None:
    for prefix, spec in table.capturing.items():
        if spelling.startswith(prefix) and spelling != prefix:
            return spec
    return None


def _captured_value(values: list[str]) -> Any:
    """True for a bare flag, a number where the text is one, else text; a list of several."""
    if not values:
        return True
    converted = [_scalar(text) for text in values]
    return converted[0] if len(converted) == 1 else converted


def _scalar(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if not _NUMBER.fullmatch(text):
        return text
    return float(text) if any(sign in text for sign in ".eE") else int(text)


def _explain_unknown(unknown: list[str], table: FlagTable) -> list[str]:
    """One problem per flag that nobody declares; its values are not reported again."""
    problems: list[str] = []
    for position, token in enumerate(unknown):
        if token.startswith("--"):
            problems.append(explain_unknown(token.partition("=")[0], table))
        elif position == 0 or not unknown[position - 1].startswith("--"):
            problems.append(f"{token!r} is not a flag and belongs to none. Flags start with --")
    return problems


def explain_unknown(spelling: str, table: FlagTable) -> str:
    """What to do about a flag that nobody declares."""
    installed = {spec.distribution for spec in table.flags.values()}
    owner = _OWNERS_BY_NAME.get(spelling) or next(
        (owner for prefix, owner in _OWNERS_BY_PREFIX.items() if spelling.startswith(prefix)), None
    )
    if owner in plugins.OWN_DISTRIBUTIONS and owner not in installed:
        return f"{spelling} belongs to {owner}, which is not installed: pip install {owner}"
    nearest = table.nearest(spelling)
    hint = f" Did you mean {nearest}?" if nearest else " `miles train --help` lists all flags"
    return f"{spelling} is not a flag.{hint}"

"""The command line: which flags were typed, as raw text."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
    """Read a command line: ``--x value``, ``--x=value``, ``--switch``, ``--no-switch``, ``--list a b c``.

    Nothing is converted or checked yet, flags are not abbreviated, and a flag given twice keeps its last value.  What
    starts with two dashes is a flag; a value that does is written ``--x=--value``.
    """
    parsed = Parsed()
    opposites = {opposite: spec for spec in table.flags.values() if (opposite := opposite_spelling(spec))}
    tokens = deque(flags)
    while tokens:
        token = tokens.popleft()
        spelling, has_value, inline = token.partition("=")
        spec = table.by_spelling.get(spelling) or opposites.get(spelling)
        if spec is not None and spec.is_switch:
            _take_switch(token, spec, parsed, value=(spelling == spec.spelling) is not spec.flag.negates)
            continue
        values = [inline] if has_value else _following(tokens, limit=None if spec is None or spec.is_list else 1)
        if spec is not None:
            _take_value(spec, values, parsed)
        elif not _is_flag(token):
            parsed.problems.append(f"{token!r} is not a flag and belongs to none. Flags start with --")
        elif collector := table.collector(spelling):
            parsed.captured.setdefault(collector.name, {})[captured_name(spelling, collector)] = _captured_value(values)
        else:
            parsed.problems.append(explain_unknown(spelling, table))
    return parsed


def _take_switch(token: str, spec: FlagSpec, parsed: Parsed, *, value: bool) -> None:
    if "=" in token:
        undo = opposite_spelling(spec)
        hint = f"; {undo} switches it off" if undo else ""
        parsed.problems.append(f"{token}: {spec.spelling} takes no value{hint}")
    else:
        parsed.values[spec.name] = value


def _take_value(spec: FlagSpec, values: list[str], parsed: Parsed) -> None:
    if values:
        parsed.values[spec.name] = values if spec.is_list else values[0]
    else:
        parsed.problems.append(f"{spec.spelling} needs a value: expected {spec.expectation}")


def _following(tokens: deque[str], limit: int | None) -> list[str]:
    """Take the values at the head of ``tokens``, at most ``limit`` of them."""
    values: list[str] = []
    while tokens and not _is_flag(tokens[0]) and (limit is None or len(values) < limit):
        values.append(tokens.popleft())
    return values


def _is_flag(token: str) -> bool:
    return token.startswith("--")


def opposite_spelling(spec: FlagSpec) -> str | None:
    """``--no-x`` of a switch ``--x``, which undoes what a file or a derivation sets; None where it would read badly."""
    if not spec.is_switch or spec.flag.negates or spec.spelling.startswith(("--no-", "--disable-")):
        return None
    return "--no-" + spec.spelling.removeprefix("--")


def captured_name(name: str, collector: FlagSpec) -> str:
    """Key under which ``collector`` holds a flag: without the prefix, with underscores."""
    prefix = (collector.flag.captures or "").removeprefix("--").replace("-", "_")
    return name.lstrip("-").replace("-", "_").removeprefix(prefix)


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


def explain_unknown(spelling: str, table: FlagTable) -> str:
    """What to do about a flag that nobody declares."""
    installed = {spec.distribution for spec in table.flags.values()}
    owner = _OWNERS_BY_NAME.get(spelling) or next(
        (owner for prefix, owner in _OWNERS_BY_PREFIX.items() if spelling.startswith(prefix)), None
    )
    if owner in plugins.OWN_DISTRIBUTIONS and owner not in installed:
        return f"{spelling} belongs to {owner}, which is not installed: pip install {owner}"
    meant = " or ".join(table.resembling(spelling))
    hint = f" Did you mean {meant}?" if meant else " `miles train --help` lists all flags"
    return f"{spelling} is not a flag.{hint}"

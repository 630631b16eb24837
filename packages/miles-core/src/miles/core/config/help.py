"""Flags in words: for ``--help``, for ``--explain`` and for the reference."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator

from miles.core.config.discover import FlagTable
from miles.core.config.flag import REQUIRED, FlagSpec
from miles.core.config.group import Group
from miles.core.config.parser import opposite_spelling

_MARGIN = 6


def usage(spec: FlagSpec) -> str:
    """The flag with a stand-in for its value."""
    if spec.is_switch:
        return spec.spelling
    if spec.flag.captures is not None:
        return f"{spec.flag.captures}NAME [VALUE ...]"
    stand_in = "{" + ",".join(spec.choices) + "}" if spec.choices else spec.type_name.upper()
    if spec.is_list:
        stand_in = f"{stand_in if spec.choices else 'VALUE'} ..."
    return f"{spec.spelling} {stand_in}"


def default_text(spec: FlagSpec) -> str:
    """The default as the reference states it: a value, ``None``, ``required``, ``derived``, or another flag."""
    if spec.default is REQUIRED:
        return "required"
    if spec.default is None:
        if spec.flag.inherits is not None:
            return "value of --" + spec.flag.inherits.replace("_", "-")
        return "None" if spec.optional else "derived"
    if spec.flag.negates:
        return str(not spec.default)
    return spec.show(spec.default)


def unsupported_text(spec: FlagSpec) -> str | None:
    """What is refused about the flag, and why; None when nothing is."""
    if spec.flag.unsupported is not None:
        return spec.flag.unsupported
    refused = [f"{value}: {reason}" for value, reason in spec.flag.unsupported_values.items()]
    return "; ".join(refused) or None


def all_flags(table: FlagTable) -> str:
    """Every flag with its help, group by group, as wide as the terminal."""
    width = min(shutil.get_terminal_size().columns, 120)
    return "\n".join(line for group in ordered_groups(table) for line in _group_lines(table, group, width))


def ordered_groups(table: FlagTable) -> list[type[Group]]:
    """Groups that declare flags, in order of discovery."""
    return [group for group in table.groups if table.of(group)]


def _group_lines(table: FlagTable, group: type[Group], width: int) -> Iterator[str]:
    yield f"{group.title}:"
    for spec in table.of(group):
        yield f"  {usage(spec)}"
        yield from textwrap.wrap(
            _sentence(spec),
            width,
            initial_indent=" " * _MARGIN,
            subsequent_indent=" " * _MARGIN,
            break_on_hyphens=False,
        )
    yield ""


def _sentence(spec: FlagSpec) -> str:
    notes = [] if spec.is_switch and default_text(spec) == "False" else [f"default: {default_text(spec)}"]
    if reason := unsupported_text(spec):
        notes.append(f"not supported: {reason}")
    return f"{plain(spec.help)} [{'; '.join(notes)}]" if notes else plain(spec.help)


def plain(text: str) -> str:
    """``text`` without the marks of reStructuredText."""
    return text.replace("``", "")


def explain(spec: FlagSpec) -> str:
    """What a flag is and who owns it."""
    lines = [usage(spec), *textwrap.wrap(plain(spec.help), 100, initial_indent="  ", subsequent_indent="  "), ""]
    facts = {
        "type": "switch" if spec.is_switch else spec.type_name,
        "choices": ", ".join(spec.choices),
        "default": default_text(spec),
        "undone by": opposite_spelling(spec) or "",
        "plugins": f"names of {spec.flag.plugin} (`miles plugins`), or a dotted path" if spec.flag.plugin else "",
        "owner": f"{spec.distribution}, group {spec.group.__name__} ({spec.group.title})",
        "in hooks": f"args.{spec.name}",
        "refused": unsupported_text(spec) or "",
    }
    return "\n".join(lines + [f"  {name + ':':<11}{text}" for name, text in facts.items() if text])

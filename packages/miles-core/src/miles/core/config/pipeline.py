"""From a command line to a draft: parse, merge the sources, resolve, check.  Problems are collected, not raised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miles.core.config.discover import FlagTable, checks, derivations, flag_table
from miles.core.config.draft import Draft, Origin
from miles.core.config.files import FileProblem, read_mapping, read_settings
from miles.core.config.parser import parse

if TYPE_CHECKING:
    from miles.core.config.config import Config


def draft_of(flags: Sequence[str], extra_values: Mapping[str, Any]) -> tuple[Draft, dict[str, Any]]:
    """Draft and values for hooks of a command line.  Problems are in ``draft.problems``."""
    table = flag_table()
    parsed = parse(flags, table)
    draft = Draft(table.flags)
    draft.problems += parsed.problems
    if path := parsed.values.get("config"):
        _read_file(path, draft, table)
    assign(draft, parsed.values, Origin.FLAG)
    for field, values in parsed.captured.items():
        _assign_captured(draft, field, values, Origin.FLAG)
    custom = _custom_values(draft, extra_values)
    _refuse_unsupported(draft)
    resolve(draft)
    return draft, custom


def draft_of_values(values: Mapping[str, Any]) -> Draft:
    """Draft of values by field name."""
    draft = Draft(flag_table().flags)
    assign(draft, values, Origin.FLAG)
    resolve(draft)
    return draft


def assign(draft: Draft, values: Mapping[str, Any], origin: Origin, where: str = "") -> None:
    """Convert and store raw values; ``where`` is the file they are from."""
    for name, raw in values.items():
        spec = draft.flags[name]
        try:
            value = spec.parse(raw)
        except ValueError as error:
            prefix = f"{where}: " if where else ""
            draft.refuse(name, f"{prefix}{spec.spelling} {_show_raw(raw)}: {error}")
        else:
            draft.set(name, value, origin, f"{where}: {spec.spelling[2:]}" if where else f"{spec.spelling} was given")


def resolve(draft: Draft) -> None:
    """Fill in what follows from what was given: derived values first, then inherited ones."""
    for derive in derivations():
        derive(draft)
    _require(draft)
    draft.inherit()


def check(config: Config, draft: Draft) -> list[str]:
    """Problems found by the rules of all packages.  Those about a flag whose value was refused already are left out."""
    if _unread_file(draft):
        return []
    refused = [draft.flags[name].spelling for name in draft.refused]
    problems = [problem for rule in checks() for problem in rule(config)]
    return [problem for problem in dict.fromkeys(problems) if not any(_names(problem, flag) for flag in refused)]


def _read_file(path: str, draft: Draft, table: FlagTable) -> None:
    try:
        values, captured, problems = read_settings(path, table)
    except FileProblem as problem:
        draft.refuse("config", str(problem))
        return
    draft.problems += problems
    assign(draft, values, Origin.FILE, path)
    for field, captured_values in captured.items():
        _assign_captured(draft, field, captured_values, Origin.FILE)


def _assign_captured(draft: Draft, field: str, values: Mapping[str, Any], origin: Origin) -> None:
    prefix = draft.flags[field].flag.captures
    draft.set(field, draft.values[field] | dict(values), origin, f"{prefix}* flags were given")


def _custom_values(draft: Draft, extra_values: Mapping[str, Any]) -> dict[str, Any]:
    sources = [("values given by the program", extra_values)]
    if path := draft.values["custom_config_path"]:
        try:
            sources.insert(0, (f"--custom-config-path {path}", read_mapping("--custom-config-path", path)))
        except FileProblem as problem:
            draft.refuse("custom_config_path", str(problem))
    custom: dict[str, Any] = {}
    for where, values in sources:
        for name in values:
            spec = flag_table().find(name)
            if spec is not None:
                draft.problems.append(
                    f"{where}: {name} is the flag {spec.spelling}. Set it on the command line or in a file of "
                    "--config; this place is for values of your own functions"
                )
        custom |= {name: value for name, value in values.items() if flag_table().find(name) is None}
    return custom


# Stands for a required value that is missing, so that the other rules can still be checked.
_PLACEHOLDER = 1


def _require(draft: Draft) -> None:
    for name, spec in draft.flags.items():
        if spec.required and draft.values[name] is None:
            if name not in draft.refused and not _unread_file(draft):
                draft.refuse(name, f"{spec.spelling} is required: {spec.help}")
            draft.values[name] = _PLACEHOLDER


def _refuse_unsupported(draft: Draft) -> None:
    for name, spec in draft.flags.items():
        reason = spec.flag.unsupported
        if reason is not None and draft.typed(name) and draft.values[name] != spec.default:
            draft.refuse(name, f"{draft.spell(name)}: not supported: {reason}. Leave it out")
        elif spec.flag.unsupported_values and (reason := spec.flag.unsupported_values.get(draft.values[name])):
            draft.refuse(name, f"{draft.spell(name)}: not supported: {reason}. Choose another value")


def _unread_file(draft: Draft) -> bool:
    """Whether the settings are unknown, so that complaints about what is missing would mislead."""
    return "config" in draft.refused


def _names(problem: str, flag: str) -> bool:
    return flag in problem.replace(":", " ").replace(",", " ").split()


def _show_raw(raw: Any) -> str:
    if isinstance(raw, Iterable) and not isinstance(raw, (str, Mapping)):
        return " ".join(str(item) for item in raw)
    return repr(raw) if raw == "" else str(raw)

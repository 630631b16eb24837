"""The flags as documents: the Markdown reference, and a JSON Schema for files of ``--config``."""

from __future__ import annotations

import re
from typing import Any

from miles.core.config.discover import FlagTable
from miles.core.config.flag import FlagSpec
from miles.core.config.group import Group
from miles.core.config.help import default_text, unsupported_text

_INTRODUCTION = """# Command line

Every flag of `miles train`. This page is written by `miles config --reference docs/reference/cli.md`.

The same names, with dashes or underscores, stand in a YAML or TOML file of `--config`. A switch `--x` is undone by
`--no-x`.
`derived` means that the value follows from others; `miles config` with your flags shows what it is and why.
"""


def markdown(table: FlagTable) -> str:
    """The reference, one table per group; the same with every version of the libraries that flags are read from."""
    groups = [group for group in table.groups if group.read_from or table.of(group)]
    contents = "\n".join(f"- [{group.title}](#{_anchor(group.title)})" for group in groups)
    sections = [f"## {group.title}\n\n{_section(table, group)}" for group in groups]
    return "\n\n".join([_INTRODUCTION.rstrip(), contents, *sections]) + "\n"


def _section(table: FlagTable, group: type[Group]) -> str:
    if group.read_from:
        return f"Flags that the installed {group.read_from} declares; `miles train --help` lists them."
    head = "| Flag | Meaning | Default | Values |\n| :--- | :--- | :--- | :--- |\n"
    return head + "\n".join(_row(spec) for spec in table.of(group))


def json_schema(table: FlagTable) -> dict[str, Any]:
    """JSON Schema of a file of ``--config``, for editors.  Keys are spelled with dashes."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Miles run configuration",
        "type": "object",
        "properties": {
            spec.spelling.removeprefix("--"): _property(spec)
            for spec in table.by_spelling.values()
            if not spec.flag.source and spec.flag.unsupported is None
        },
        "patternProperties": {f"^{prefix.removeprefix('--')}": {} for prefix in table.capturing},
        "additionalProperties": False,
    }


def _row(spec: FlagSpec) -> str:
    spelling = f"{spec.flag.captures}*" if spec.flag.captures else spec.spelling
    meaning = spec.help.replace("``", "`").replace("|", "\\|")
    if reason := unsupported_text(spec):
        meaning += f" **Not supported yet:** {reason}."
    values = ", ".join(f"`{choice}`" for choice in spec.choices) or spec.type_name
    return f"| `{spelling}` | {meaning} | `{default_text(spec)}` | {values} |"


def _property(spec: FlagSpec) -> dict[str, Any]:
    schema: dict[str, Any] = {**spec.json_schema(), "description": spec.help.replace("``", "`")}
    if not spec.required and spec.default is not None:
        schema["default"] = not spec.default if spec.flag.negates else spec.default
    return schema


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")

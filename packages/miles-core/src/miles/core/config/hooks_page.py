"""Users' hooks as a page: every signature from the code, with the flag that names it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from miles.core.config.discover import FlagTable
from miles.core.types import hooks
from miles.core.types.hook_table import HOOKS

_INTRODUCTION = """# Functions of your own

Every place where a flag names a function or a class of yours; `miles config --unsupported` lists those that are not
built yet. This page is written by `miles config --hooks docs/reference/hooks.md` from `miles.core.types.hooks` and
`miles.core.protocols`.
"""


def markdown(table: FlagTable) -> str:
    """The page: one section per hook of the flags in ``table``."""
    about = " ".join((inspect.getdoc(hooks) or "").split("\n\n")[1].split())
    sections = [_section(table, field, forms) for field, forms in HOOKS.items() if field in table.flags]
    return "\n".join([_INTRODUCTION, _code_spans(about), *sections])


def signatures(form: type) -> Iterator[str]:
    """``name(parameters) -> result`` of each method of a protocol, as it is written; ``__call__`` has no name."""
    for name, method in vars(form).items():
        # Protocols get a constructor from typing, which is not theirs.
        if not inspect.isfunction(method) or not method.__qualname__.startswith(form.__qualname__):
            continue
        signature = inspect.signature(method)
        parameters = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
        text = str(signature.replace(parameters=parameters)).replace("'", "")
        yield ("" if name == "__call__" else name) + text


def _section(table: FlagTable, field: str, forms: tuple[type, ...]) -> str:
    spec = table.flags[field]
    lines = [f"\n## `{spec.spelling}`\n"]
    for number, form in enumerate(forms):
        if number:
            lines.append("or\n")
        text = "\n".join(signatures(form))
        lines.append(f"```python\n{text}\n```\n\n{_code_spans(inspect.getdoc(form) or '')}\n")
    return "\n".join(lines).rstrip("\n")


def _code_spans(text: str) -> str:
    return text.replace("``", "`")

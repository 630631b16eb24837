"""Flags for the fields of Megatron-Core's configuration classes, read from its source without importing it.

Importing Megatron-Core takes seconds and torch; the command line must not.  Names, types, choices and texts are those
of the installed version.
"""

from __future__ import annotations

import ast
import importlib.util
import types
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Optional, Union

from pydantic import Field

from miles.core.config.group import Group

_FILES = {
    "ModelParallelConfig": "model_parallel_config.py",
    "TransformerConfig": "transformer/transformer_config.py",
    "MLATransformerConfig": "transformer/transformer_config.py",
}
# Types that have a spelling on a command line.
_NAMES = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "Optional": Optional,
    "Union": Union,
    "Literal": Literal,
    "List": list,
    "list": list,
    "Tuple": tuple,
}


@dataclass(frozen=True, slots=True)
class ConfigField:
    """A field of one of the classes."""

    name: str
    type: Any
    text: str


def installed_fields() -> list[ConfigField]:
    """Fields of the installed Megatron-Core that a flag can set; none where it is not installed."""
    root = _package_directory()
    if root is None:
        return []
    fields: dict[str, ConfigField] = {}
    for class_name, file in _FILES.items():
        tree = ast.parse((root / file).read_text(encoding="utf-8"))
        fields |= {field.name: field for field in _fields(tree, class_name) if field.name not in fields}
    return list(fields.values())


def flag_group(name: str, title: str, taken: Collection[str]) -> type[Group]:
    """A group with a flag for every field whose name is not ``taken``.  Unset flags are None: nothing is forwarded.

    It is found as ``miles.megatron.flags.NAME`` when it is unpickled.
    """
    fields = [field for field in installed_fields() if field.name not in taken]
    annotations: dict[str, Any] = {
        field.name: Annotated[Optional[field.type], Field(description=field.text)]  # noqa: UP045
        for field in fields
    }
    unset: dict[str, Any] = dict.fromkeys((field.name for field in fields), None)
    annotations |= {"title": ClassVar[str], "read_from": ClassVar[str | None]}
    shown = {"title": title, "read_from": "megatron-core"}
    body = {"__module__": "miles.megatron.flags", "__annotations__": annotations, **shown}
    made: type[Group] = types.new_class(name, (Group,), exec_body=lambda namespace: namespace.update(body, **unset))
    return made


def _package_directory() -> Path | None:
    """Where ``megatron.core`` is; ``megatron`` itself is a namespace, so that nothing is imported to find out."""
    namespace = importlib.util.find_spec("megatron")
    if namespace is None:
        return None
    for place in namespace.submodule_search_locations or ():
        core = Path(place) / "core"
        if (core / _FILES["ModelParallelConfig"]).is_file():
            return core
    return None


def _fields(tree: ast.Module, class_name: str) -> Iterator[ConfigField]:
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        type_ = _type(node.annotation)
        if type_ is not None and not node.target.id.startswith("_"):
            yield ConfigField(node.target.id, type_, _docstring(following))


def _type(annotation: ast.expr) -> Any:
    """The type that ``annotation`` names; None when it is not made of ``_NAMES`` alone."""
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    if not names <= _NAMES.keys() or any(isinstance(node, ast.Attribute) for node in ast.walk(annotation)):
        return None
    return eval(compile(ast.Expression(annotation), "<megatron.core>", "eval"), {"__builtins__": {}}, dict(_NAMES))  # noqa: S307


def _docstring(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split()).rstrip(".") + "."
    return "See TransformerConfig of Megatron-Core."

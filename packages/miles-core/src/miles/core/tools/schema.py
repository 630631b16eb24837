"""Arguments against their JSON schema: enough to tell a model what is wrong before a tool runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from miles.core.protocols.tools import ToolSpec


def function_of(spec: ToolSpec) -> Mapping[str, Any]:
    """The part with ``name`` and ``parameters``; a definition may be that part alone."""
    inner = spec.get("function", spec)
    return inner if isinstance(inner, Mapping) else {}


def find(name: str, tools: Sequence[ToolSpec]) -> Mapping[str, Any] | None:
    """The function called ``name``."""
    return next((function for spec in tools if (function := function_of(spec)).get("name") == name), None)


def typed_arguments(name: str, written: Mapping[str, str], tools: Sequence[ToolSpec]) -> dict[str, Any]:
    """Arguments that a format writes as plain text: strings stay, the rest is JSON where it can be."""
    properties = _parameters(find(name, tools)).get("properties") or {}
    return {key: _typed(text, properties.get(key)) for key, text in written.items()}


def problem_with(arguments: Mapping[str, Any], function: Mapping[str, Any]) -> str | None:
    """What is missing, unknown or of a wrong type; None when the call can be made."""
    parameters = _parameters(function)
    properties = parameters.get("properties") or {}
    missing = [name for name in parameters.get("required") or () if name not in arguments]
    if missing:
        return f"missing {', '.join(missing)}"
    unknown = [name for name in arguments if name not in properties]
    if unknown and parameters.get("additionalProperties") is False:
        return f"unknown {', '.join(unknown)}; there are {', '.join(properties)}"
    for name, value in arguments.items():
        wanted = (properties.get(name) or {}).get("type")
        if isinstance(wanted, str) and wanted in _TYPES and not _is(value, wanted):
            return f"{name} must be of type {wanted}, found {json.dumps(value)[:100]}"
    return None


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}


def _is(value: Any, wanted: str) -> bool:
    if isinstance(value, bool) and wanted != "boolean":
        return False
    if wanted == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[wanted])


def _parameters(function: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return (function or {}).get("parameters") or {}


def _typed(text: str, schema: Any) -> Any:
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text

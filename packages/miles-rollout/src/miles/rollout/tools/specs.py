"""Tool definitions of ``--generate-tool-specs-path``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from miles.core.errors import ConfigError
from miles.core.registry import load_object
from miles.core.tools.schema import function_of

FLAG = "--generate-tool-specs-path"
_FILES = (".json", ".yaml", ".yml")


def names_file(path: str) -> bool:
    """Whether ``path`` is a file's rather than an object's."""
    return path.endswith(_FILES)


def load_tool_specs(path: str) -> list[dict[str, Any]]:
    """The list in a JSON or YAML file, or at a dotted path; ConfigError says what is wrong with it."""
    specs = _read(Path(path)) if names_file(path) else load_object(path)
    if not isinstance(specs, list) or not specs:
        raise ConfigError(f"{FLAG} {path}: expected a list of tool definitions, found {type(specs).__name__}")
    for number, spec in enumerate(specs, 1):
        if not isinstance(spec, dict) or not isinstance(function_of(spec).get("name"), str):
            raise ConfigError(
                f"{FLAG} {path}: definition {number} has no name; expected "
                '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'
            )
    return specs


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{FLAG} {path}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{FLAG} {path}: not {path.suffix[1:].upper()}: {error}") from error

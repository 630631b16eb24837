"""Files of settings: YAML or TOML mappings."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import yaml

from miles.core.config.discover import FlagTable
from miles.core.config.parser import captured_name


class FileProblem(ValueError):
    """A file of settings cannot be used.  Says which, where and why."""


def read_mapping(flag: str, path: str) -> dict[str, Any]:
    """The mapping in the YAML or TOML file ``path`` that ``flag`` names.  Raises FileProblem."""
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise FileProblem(f"{flag} {path}: the file cannot be read ({reason})") from None
    try:
        content = tomllib.loads(text) if file.suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise FileProblem(f"{flag} {path}: not valid {file.suffix.lstrip('.') or 'YAML'}: {_one_line(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise FileProblem(f"{flag} {path}: expected a mapping from names to values at the top, found {_kind(content)}")
    return content


def read_settings(path: str, table: FlagTable) -> tuple[dict[str, Any], dict[str, dict[str, Any]], list[str]]:
    """Raw values by field name, captured values by collecting field, and problems, of a file of ``--config``."""
    values: dict[str, Any] = {}
    captured: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for key, value in read_mapping("--config", path).items():
        spec = table.find(key)
        collector = None if spec else table.collector(key)
        if spec is not None and spec.flag.source:
            problems.append(
                f"{path}: {key} cannot stand in a file of settings; give {spec.spelling} on the command line"
            )
        elif spec is not None:
            inverted = spec.flag.negates and table.by_spelling.get(_spelling(key)) is spec
            values[spec.name] = not value if inverted and isinstance(value, bool) else value
        elif collector is not None:
            captured.setdefault(collector.name, {})[captured_name(key, collector)] = value
        else:
            problems.append(_unknown(path, key, table))
    return values, captured, problems


def _spelling(key: str) -> str:
    return "--" + key.lstrip("-").replace("_", "-")


def _unknown(path: str, key: str, table: FlagTable) -> str:
    meant = " or ".join(spelling.removeprefix("--") for spelling in table.resembling(key))
    hint = f" Did you mean {meant}?" if meant else ""
    return (
        f"{path}: {key} is not the name of a flag.{hint} Values for your own functions belong into a file of "
        "--custom-config-path"
    )


def _kind(content: object) -> str:
    if isinstance(content, dict):
        return "a key that is not text"
    return {"list": "a list", "str": "text"}.get(type(content).__name__, type(content).__name__)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

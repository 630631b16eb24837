"""A resolved configuration in words: ``miles config``."""

from __future__ import annotations

import json

from miles.core.config.config import Config
from miles.core.config.discover import flag_table
from miles.core.config.flag import FlagSpec
from miles.core.config.help import unsupported_text

_WIDEST_VALUE = 32


def as_text(config: Config, *, show_all: bool) -> str:
    """One line per value: name, value, origin, reason.  Defaults only with ``show_all``."""
    rows = [
        (name, _text(config, name), _origin(config, name), _reason(config, name)) for name in _names(config, show_all)
    ]
    width = min(max((len(text) for _, text, _, _ in rows), default=0), _WIDEST_VALUE)
    return "\n".join(f"{name:<36} {text:<{width}}  {origin:<9}  {why}".rstrip() for name, text, origin, why in rows)


def as_json(config: Config, *, show_all: bool) -> str:
    """The same as a JSON object by name."""
    values = config.record()
    entries = {
        name: {"value": values[name], "origin": _origin(config, name), "reason": _reason(config, name)}
        for name in _names(config, show_all)
    }
    return json.dumps(entries, indent=1, default=str)


def state_of(config: Config, spec: FlagSpec) -> str:
    """What one flag resolved to, and why."""
    reason = _reason(config, spec.name)
    return f"{_text(config, spec.name)} ({_origin(config, spec.name)}{': ' + reason if reason else ''})"


def unsupported() -> list[str]:
    """One line per flag that is refused when set."""
    refused = [(spec.spelling, unsupported_text(spec)) for spec in flag_table().flags.values()]
    return [f"{spelling:<48} {reason}" for spelling, reason in refused if reason is not None]


def _names(config: Config, show_all: bool) -> list[str]:
    declared = [name for name in flag_table().flags if show_all or config.origin[name] != "default"]
    return declared + list(config.custom())


def _text(config: Config, name: str) -> str:
    value, spec = config.record()[name], flag_table().flags.get(name)
    return str(value) if spec is None or value is None else spec.show(value)


def _origin(config: Config, name: str) -> str:
    return str(config.origin[name])


def _reason(config: Config, name: str) -> str:
    return config.reason.get(name, "")

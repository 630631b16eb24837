"""A configuration while it is made: values, and where each came from."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from miles.core.config.flag import FlagSpec


class Origin(StrEnum):
    """Where a value came from, weakest first."""

    DEFAULT = "default"
    BACKEND = "backend"
    INHERITED = "inherited"
    DERIVED = "derived"
    FILE = "file"
    FLAG = "flag"
    CUSTOM = "custom"
    """A value for users' hooks, which no flag declares."""


class Draft:
    """Values by field name.  A typed value (from a flag or a file) is never changed."""

    def __init__(self, flags: Mapping[str, FlagSpec]) -> None:
        self.flags = flags
        self.values: dict[str, Any] = {name: None if spec.required else spec.default for name, spec in flags.items()}
        self.origins: dict[str, Origin] = dict.fromkeys(flags, Origin.DEFAULT)
        self.reasons: dict[str, str] = {}
        self.problems: list[str] = []
        self.refused: set[str] = set()
        """Fields with a problem of their own; rules across flags need not complain about them again."""

    def __getitem__(self, name: str) -> Any:
        """Present value; that of the field it inherits from as long as it has none of its own."""
        parent = self.flags[name].flag.inherits
        if parent is not None and self.values[name] is None and not self.typed(name):
            return self[parent]
        return self.values[name]

    def __contains__(self, name: str) -> bool:
        return name in self.flags

    def typed(self, name: str) -> bool:
        """Whether the user gave the value."""
        return self.origins[name] in (Origin.FLAG, Origin.FILE)

    def set(self, name: str, value: Any, origin: Origin, reason: str) -> None:
        """Store a value that the user gave."""
        self.values[name], self.origins[name], self.reasons[name] = value, origin, reason

    def refuse(self, name: str, problem: str) -> None:
        """Report a problem of one field's own."""
        self.refused.add(name)
        self.problems.append(problem)

    def derive(self, name: str, value: Any, reason: str, origin: Origin = Origin.DERIVED) -> None:
        """Set what follows from other values, unless the user gave the field or no installed package has it."""
        if name in self and not self.typed(name):
            self.set(name, value, origin, reason)

    def inherit(self) -> None:
        """Give every field without a value that of the field it inherits from; a flag without effect needs none."""
        for name, spec in self.flags.items():
            parent = spec.flag.inherits if spec.flag.unsupported is None else None
            if parent is not None and self.values[name] is None and not self.typed(name):
                value = self[name]
                if value is not None:
                    self.set(name, value, Origin.INHERITED, f"from {self.flags[parent].spelling}")

    def spell(self, name: str) -> str:
        """Spelling of the flag of a field, with its value: how messages name it."""
        spec, value = self.flags[name], self[name]
        if spec.is_switch or value is None:
            return spec.spelling
        return f"{spec.spelling} {spec.show(value)}"

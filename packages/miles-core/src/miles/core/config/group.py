"""A group of flags: one frozen pydantic model, one field per flag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

DERIVED: Any = None
"""Default of a field that is ``None`` only until the configuration is resolved; its type is what readers see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """What a field's type cannot say about its flag.  Goes into ``Annotated``."""

    spelling: str | None = None
    """The flag when it is not ``--`` and the field's name with dashes."""
    negates: bool = False
    """The flag switches the field off."""
    inherits: str | None = None
    """Field whose value this one takes when nobody set it."""
    plugin: str | None = None
    """Entry-point group whose names are the choices; a dotted path is accepted too."""
    composed: bool = False
    """The value may combine several plugin names; the package that reads it checks them."""
    path: bool = False
    """A dotted path to an object of the user's."""
    captures: str | None = None
    """Prefix: the field collects every flag that starts with it and that no group declares."""
    unsupported: str | None = None
    """Why setting the flag to anything but its default is refused."""
    unsupported_values: Mapping[str, str] = field(default_factory=dict)
    """Why some of the choices are refused."""
    secret: bool = False
    """The value is never shown or written to a file."""
    source: bool = False
    """The flag names a source of values; it cannot stand in a configuration file."""


class Group(BaseModel):
    """Base of all groups.  A field's docstring is its flag's help, its type parses the text, its bounds check it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), hide_input_in_errors=True
    )

    title: ClassVar[str]
    """Heading of the group in ``--help`` and in the reference."""

    read_from: ClassVar[str | None] = None
    """The installed library that the flags are read from, if they are: then they differ with its version."""

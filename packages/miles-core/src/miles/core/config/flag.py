"""One flag: a field of a group, as the command line, files and help see it."""

from __future__ import annotations

import json
import types
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from miles.core.config.group import Flag, Group

REQUIRED: Any = PydanticUndefined


@dataclass(frozen=True)
class FlagSpec:
    """Everything about one flag.  Equal flags are the same field of the same group."""

    name: str
    """The field's name: the key in ``config.json``, and the attribute of ``args``."""
    group: type[Group]
    distribution: str
    """Distribution that owns the flag."""
    info: FieldInfo

    @cached_property
    def flag(self) -> Flag:
        return next((entry for entry in self.info.metadata if isinstance(entry, Flag)), Flag())

    @cached_property
    def spelling(self) -> str:
        return self.flag.spelling or "--" + self.name.replace("_", "-")

    @property
    def help(self) -> str:
        return " ".join((self.info.description or "").split())

    @property
    def required(self) -> bool:
        return self.info.is_required()

    @property
    def default(self) -> Any:
        """Default of the field; ``REQUIRED`` when there is none."""
        return self.info.get_default(call_default_factory=True)

    @cached_property
    def types(self) -> tuple[Any, ...]:
        """Alternatives of the field's type, None and constraints left out."""
        return tuple(_alternatives(self.info.annotation))

    @property
    def is_switch(self) -> bool:
        return self.types == (bool,)

    @property
    def is_list(self) -> bool:
        return any(get_origin(kind) is list for kind in self.types)

    @property
    def is_mapping(self) -> bool:
        return any(get_origin(kind) is dict for kind in self.types)

    @property
    def optional(self) -> bool:
        return type(None) in get_args(self.info.annotation)

    @cached_property
    def choices(self) -> tuple[str, ...]:
        """Values of a field with a closed set of them."""
        kinds = [get_args(kind)[0] if get_origin(kind) is list else kind for kind in self.types]
        return tuple(str(value) for kind in kinds if get_origin(kind) is Literal for value in get_args(kind))

    @property
    def type_name(self) -> str:
        """Type in the words of the reference: ``int``, ``List[str]``, ``JSON`` ..."""
        if self.is_switch:
            return "flag"
        if self.is_mapping:
            return "JSON"
        kind = self.types[0]
        if get_origin(kind) is list:
            item = get_args(kind)[0]
            return f"List[{'str' if get_origin(item) is Literal else item.__name__}]"
        return "str" if get_origin(kind) is Literal else str(kind.__name__)

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        constraints = tuple(entry for entry in self.info.metadata if not isinstance(entry, Flag))
        annotation: Any = self.info.annotation
        return TypeAdapter(Annotated[(annotation, *constraints)] if constraints else annotation)

    def parse(self, raw: Any) -> Any:
        """Value of a text of the command line or of an entry of a file.  Raises ValueError with the expectation."""
        if raw is None or (self.optional and isinstance(raw, str) and raw in ("None", "none", "null")):
            if self.optional:
                return None
            raise ValueError(f"expected {self.expectation}")
        if self.is_mapping and isinstance(raw, str):
            raw = _json(raw)
        if self.is_list and isinstance(raw, (str, int, float)):
            raw = [raw]
        try:
            return self._adapter.validate_python(raw)
        except ValidationError as error:
            raise ValueError(_explain(error, self)) from None

    def json_schema(self) -> dict[str, Any]:
        """JSON Schema of a value in a file."""
        return self._adapter.json_schema()

    @property
    def expectation(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        return _EXPECTED.get(self.type_name, f"a value of type {self.type_name}")

    def show(self, value: Any) -> str:
        """``value`` as one would type it."""
        if isinstance(value, list):
            return " ".join(str(item) for item in value)
        return json.dumps(value) if isinstance(value, dict) else str(value)


_EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "flag": "true or false",
    "JSON": "a JSON object",
    "List[str]": "a list of texts",
    "List[int]": "a list of integers",
}

_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}


def _explain(error: ValidationError, spec: FlagSpec) -> str:
    for detail in error.errors(include_url=False):
        if detail["type"] in _BOUNDS:
            bound, words = _BOUNDS[detail["type"]]
            return f"expected {words} {detail['ctx'][bound]:g}"
        if detail["type"] == "finite_number":
            return "expected a finite number"
    return f"expected {spec.expectation}"


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON object ({error.msg} at character {error.pos})") from None


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _alternatives(part)]
    return [] if annotation is type(None) else [annotation]

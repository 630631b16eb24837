"""The resolved configuration of a run: typed by group, flat by name, read-only."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from miles.core.config import pipeline
from miles.core.config.discover import flag_table
from miles.core.config.draft import Draft, Origin
from miles.core.config.group import Group
from miles.core.errors import ConfigError

G = TypeVar("G", bound=Group)


class Config:
    """``config[Algorithm].eps_clip`` for us, ``config.eps_clip`` for users' hooks, ``config.origin["eps_clip"]``.

    Values of ``--custom-config-path`` are attributes as well.  Picklable.
    """

    _groups: dict[type[Group], Group]
    _values: dict[str, Any]
    _custom: dict[str, Any]
    _origin: dict[str, str]
    _reason: dict[str, str]

    def __init__(
        self,
        groups: Sequence[Group],
        origin: Mapping[str, str] | None = None,
        reason: Mapping[str, str] | None = None,
        custom: Mapping[str, Any] | None = None,
    ) -> None:
        values = {name: getattr(group, name) for group in groups for name in type(group).model_fields}
        set_once = object.__setattr__
        set_once(self, "_groups", {type(group): group for group in groups})
        set_once(self, "_values", values | dict(custom or {}))
        set_once(self, "_custom", dict(custom or {}))
        origins = dict.fromkeys(values, Origin.DEFAULT) | dict.fromkeys(custom or {}, Origin.CUSTOM)
        set_once(self, "_origin", origins | dict(origin or {}))
        set_once(self, "_reason", dict(reason or {}))

    @classmethod
    def from_flags(
        cls, flags: Sequence[str], *, extra_values: Mapping[str, Any] | None = None, check: bool = True
    ) -> Config:
        """Configuration of a command line: parsed, resolved and checked.

        ``extra_values`` are values for users' hooks, as ``--custom-config-path`` would give them.  Raises ConfigError
        with every problem there is.  Without ``check`` the rules across flags and the existence of files are left out.
        """
        config, problems = cls.examine(flags, extra_values=extra_values, check=check)
        if problems:
            raise ConfigError(*problems)
        return config

    @classmethod
    def examine(
        cls, flags: Sequence[str], *, extra_values: Mapping[str, Any] | None = None, check: bool = True
    ) -> tuple[Config, list[str]]:
        """Configuration of a command line as far as it can be understood, and everything that is wrong with it.

        With problems it shows what the rest resolves to; only a configuration without any may be run.
        """
        draft, custom = pipeline.draft_of(flags, extra_values or {})
        config = cls._of_draft(draft, custom)
        return config, draft.problems + (pipeline.check(config, draft) if check else [])

    @classmethod
    def of(cls, **values: Any) -> Config:
        """Configuration of these values, resolved but not checked; for tests and programs.

        A value is given under its field's name.  Unless it is given, ``rollout_batch_size`` is 1.  A name that no field
        has becomes a value for hooks.
        """
        table = flag_table()
        given = {"rollout_batch_size": 1} | {name: value for name, value in values.items() if name in table.flags}
        custom = {name: value for name, value in values.items() if name not in table.flags}
        draft = pipeline.draft_of_values(given)
        if draft.problems:
            raise ConfigError(*draft.problems)
        return cls._of_draft(draft, custom)

    @classmethod
    def _of_draft(cls, draft: Draft, custom: Mapping[str, Any]) -> Config:
        groups = [
            group.model_construct(**{name: draft.values[name] for name in group.model_fields})
            for group in flag_table().groups
        ]
        return cls(groups, draft.origins, draft.reasons, custom)

    def with_value(self, name: str, value: Any, reason: str) -> Config:
        """A copy in which the field ``name`` has what became known only after the flags were read."""
        groups = [
            group.model_copy(update={name: value}) if name in type(group).model_fields else group
            for group in self._groups.values()
        ]
        return Config(groups, self._origin | {name: Origin.DERIVED}, self._reason | {name: reason}, self._custom)

    def __getitem__(self, group: type[G]) -> G:
        try:
            found = self._groups[group]
        except KeyError:
            raise KeyError(f"{group.__name__} is not a group of this configuration") from None
        assert isinstance(found, group)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._values or name in self._groups

    def __getattr__(self, name: str) -> Any:
        values: dict[str, Any] = object.__getattribute__(self, "_values")
        try:
            return values[name]
        except KeyError:
            nearest = difflib.get_close_matches(name, values, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise AttributeError(f"the configuration has no {name!r}{hint}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"the configuration is read-only: {name!r} cannot be set")

    def __reduce__(self) -> tuple[type[Config], tuple[Any, ...]]:
        return Config, (list(self._groups.values()), self._origin, self._reason, self._custom)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self._values == other._values

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        given = {name: value for name, value in self.record().items() if self._origin.get(name) in ("flag", "file")}
        return f"Config({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    @property
    def origin(self) -> Mapping[str, str]:
        """Where the value of each field came from: default, backend, inherited, derived, file, flag or custom."""
        return MappingProxyType(self._origin)

    @property
    def reason(self) -> Mapping[str, str]:
        """Why a field that was not left at its default has its value."""
        return MappingProxyType(self._reason)

    def values(self) -> dict[str, Any]:
        """Every value by name, those for users' hooks included."""
        return dict(self._values)

    def record(self) -> dict[str, Any]:
        """Every value by name, to be shown or written to a file: secrets are replaced by stars."""
        flags = flag_table().flags
        secret = {name for name, spec in flags.items() if spec.flag.secret and self._values.get(name) is not None}
        return {name: "***" if name in secret else value for name, value in self._values.items()}

    def custom(self) -> dict[str, Any]:
        """Values for users' hooks alone."""
        return dict(self._custom)

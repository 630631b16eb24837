"""Plugins by name.  One registry per entry-point group; a dotted path is accepted wherever a name is."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from pathlib import Path
from typing import Any

from miles.core import plugins
from miles.core.errors import PluginError
from miles.core.plugins import Plugin

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*[.:][A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class Registry:
    """The plugins of one entry-point group.  Nothing is imported before ``get``; what is installed is read once."""

    def __init__(self, group: str) -> None:
        self.group = group
        self._plugins: dict[str, list[Plugin]] | None = None

    def names(self) -> list[str]:
        """Registered names, sorted."""
        return sorted(self._by_name())

    def __contains__(self, name: str) -> bool:
        return name in self._by_name()

    def get(self, name: str) -> Any:
        """The object registered as ``name``, or at the dotted path ``name``.

        Raises PluginError when nothing has that name, when two distributions claim it, or when it cannot be imported.
        """
        plugin = self.find(name)
        if plugin is None:
            return load_object(name)
        try:
            return load_object(plugin.target)
        except PluginError as error:
            raise PluginError(
                f"{name!r} ({self.group}) of {plugin.distribution} {plugin.version} cannot be loaded: {error}"
            ) from error

    def find(self, name: str) -> Plugin | None:
        """What is registered as ``name``; None for a dotted path.  Raises PluginError like ``get``, imports nothing."""
        candidates = self._by_name().get(name, [])
        if len(candidates) > 1:
            owners = " and ".join(str(plugin) for plugin in candidates)
            raise PluginError(f"{name!r} ({self.group}) is registered twice, by {owners}. Uninstall one of them")
        if candidates:
            return candidates[0]
        if is_dotted(name):
            return None
        raise PluginError(self._missing(name))

    def _by_name(self) -> dict[str, list[Plugin]]:
        if self._plugins is None:
            self._plugins = {}
            for plugin in plugins.installed(self.group):
                self._plugins.setdefault(plugin.name, []).append(plugin)
        return self._plugins

    def _missing(self, name: str) -> str:
        known = plugins.WELL_KNOWN.get(self.group, {})
        if package := known.get(name):
            return f"{name!r} ({self.group}) is provided by {package}, which is not installed: pip install '{package}'"
        nearest = difflib.get_close_matches(name, [*self._by_name(), *known], n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        installed = ", ".join(self.names()) or "none"
        return f"no {name!r} ({self.group}).{hint} Installed: {installed}. A dotted path to an object works as well"


def is_dotted(name: str) -> bool:
    """Whether ``name`` has the form of a dotted path, ``pkg.mod.attr`` or ``pkg.mod:attr``."""
    return _DOTTED.fullmatch(name) is not None


def import_from(directory: Path) -> None:
    """Let dotted paths name modules in ``directory``, after all that is installed."""
    if str(directory) not in sys.path:
        sys.path.append(str(directory))


def load_object(path: str) -> Any:
    """The object at ``pkg.mod.attr`` or ``pkg.mod:attr``.  Raises PluginError that says what is missing."""
    module_name, separator, attributes = path.partition(":")
    if not separator:
        module_name, _, attributes = path.rpartition(".")
    if not module_name or not attributes:
        raise PluginError(f"{path!r} is not a dotted path to an object, like package.module.name")
    found: Any = _import(module_name, path)
    for attribute in attributes.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError:
            names = [name for name in dir(found) if not name.startswith("_")]
            nearest = difflib.get_close_matches(attribute, names, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise PluginError(f"{path!r}: {module_name} has no {attribute!r}{hint}") from None
    return found


def _import(module_name: str, path: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise PluginError(f"{path!r}: there is no module {error.name!r} on the Python path") from error
        raise PluginError(f"{path!r}: {module_name} needs {error.name!r}, which is not installed") from error
    except Exception as error:
        raise PluginError(f"{path!r}: importing {module_name} failed with {type(error).__name__}: {error}") from error

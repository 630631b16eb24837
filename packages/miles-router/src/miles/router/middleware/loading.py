"""Finds middleware by name and puts it around the router."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import ASGIApp

from miles.core.errors import PluginError
from miles.core.registry import Registry
from miles.router.middleware.protocols import Middleware, RouterHandle


def load_middleware(names: Sequence[str]) -> list[type[Middleware]]:
    """The classes called ``names``, in that order; raises PluginError."""
    registry = Registry("miles.router_middlewares")
    return [_load(name, registry) for name in names]


def _load(name: str, registry: Registry) -> type[Middleware]:
    try:
        found: type[Middleware] = registry.get(name)
    except PluginError as error:
        raise PluginError(f"--middleware {name}: {error}") from error
    if not callable(found):
        raise PluginError(f"--middleware {name}: {found!r} is not a class: expected Middleware(app, *, router)")
    return found


def wrap(app: ASGIApp, classes: Sequence[type[Middleware]], router: RouterHandle) -> ASGIApp:
    """``app`` inside of all ``classes``, the first one outermost."""
    for middleware in reversed(classes):
        app = middleware(app, router=router)
    return app

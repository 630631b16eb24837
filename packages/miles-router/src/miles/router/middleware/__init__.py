"""Middleware: ASGI applications around the router, given by ``--middleware``.

A middleware is a class that takes the application inside it and a handle of the router, and is itself an ASGI
application (https://asgi.readthedocs.io).  It may answer a request, change it on its way in, or change the answer on
its way out::

    class Stamp:
        def __init__(self, app: ASGIApp, *, router: RouterHandle) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def stamped(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"x-stamp", b"1")]
                await send(message)

            await self.app(scope, receive, stamped)

It sees every request, those to the control plane included; bodies arrive in pieces and should be passed on in pieces.
Its own state may be plain attributes: all requests are served in one event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from miles.core.errors import PluginError
from miles.core.registry import Registry
from miles.router.fetch import FetchedResponse
from miles.router.framing import Header
from miles.router.settings import Settings

if TYPE_CHECKING:
    from miles.router.tokenizer import CheckpointTokenizer


class WorkerView(Protocol):
    """What a middleware may know of a worker."""

    @property
    def url(self) -> str: ...

    @property
    def state(self) -> str:
        """``probing``, ``healthy``, ``suspect`` or ``quarantined``."""

    @property
    def in_flight(self) -> int: ...

    @property
    def weight_version(self) -> str | None: ...


class RouterHandle(Protocol):
    """The router as a middleware sees it; ``workers`` and ``weight_version`` change while it runs."""

    @property
    def settings(self) -> Settings: ...

    @property
    def tokenizer(self) -> CheckpointTokenizer:
        """Of ``--tokenizer``; asking for it raises ConfigError when there is none."""

    @property
    def workers(self) -> Sequence[WorkerView]:
        """All registered workers."""

    @property
    def weight_version(self) -> str | None:
        """The newest version that a healthy worker holds."""

    async def ask(self, method: str, target: str, headers: Sequence[Header], body: bytes) -> FetchedResponse:
        """A worker's whole answer to a request of one's own, with queue, policy and retries.

        Raises ``miles.router.inner.RefusedError`` when there is none.
        """


class Middleware(Protocol):
    """``miles.router_middlewares`` entry points name classes of this shape."""

    def __init__(self, app: ASGIApp, *, router: RouterHandle) -> None: ...

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


def load_middleware(names: Sequence[str]) -> list[type[Middleware]]:
    """The classes called ``names``, in that order; raises PluginError."""
    registry = Registry("miles.router_middlewares")
    classes = [registry.get(name) for name in names]
    for name, found in zip(names, classes):
        if not callable(found):
            raise PluginError(f"--middleware {name}: {found!r} is not a class: expected Middleware(app, *, router)")
    return classes


def wrap(app: ASGIApp, classes: Sequence[type[Middleware]], router: RouterHandle) -> ASGIApp:
    """``app`` inside of all ``classes``, the first one outermost."""
    for middleware in reversed(classes):
        app = middleware(app, router=router)
    return app

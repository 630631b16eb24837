"""What a middleware is, and what it may know of the router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

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

"""What a policy is, and what it may know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class RoutableWorker(Protocol):
    """What a policy may know of a worker."""

    url: str
    in_flight: int
    weight: float


class RoutableRequest(Protocol):
    """What a policy may know of a request.  Looking at the body costs time; most policies need not."""

    def header(self, name: bytes) -> bytes | None:
        """Value of the first field called ``name`` (lower case)."""

    def body_start(self) -> bytes:
        """The body, or the first part of a long one."""


W = TypeVar("W", bound=RoutableWorker)


class Policy(Protocol):
    """Chooses among workers that may take the request."""

    def choose(self, workers: Sequence[W], request: RoutableRequest) -> W:
        """One of ``workers``, which are never empty.  Runs in the event loop: a few microseconds at most."""

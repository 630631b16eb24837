"""The sessions that exist: bounded in number, forgotten when nobody uses them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from miles.router.sessions.trajectory import Trajectory


@dataclass(eq=False, slots=True)
class Session:
    """One agent's conversation."""

    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    trajectory: Trajectory = field(default_factory=Trajectory)
    records: list[dict[str, Any]] = field(default_factory=list)
    """One for each turn of the trajectory: what was asked and answered."""
    planning: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a request's token ids are made."""
    under_way: set[asyncio.Task[Any]] = field(default_factory=set)
    """Generations that have not ended."""
    num_commits: int = 0
    num_unrecorded: int = 0
    """Answers given but not recorded, because another request of the session was answered first."""
    num_rollbacks: int = 0
    """Turns that a retry took back."""
    used_at: float = field(default_factory=time.monotonic)


class TooManySessionsError(Exception):
    """All places are taken by sessions in use."""


class SessionStore:
    """At most ``capacity`` sessions; a new one takes the place of the one unused longest, if that is idle enough."""

    def __init__(self, capacity: int, idle_timeout_s: float) -> None:
        self._capacity = capacity
        self._idle_timeout_s = idle_timeout_s
        self._sessions: OrderedDict[str, Session] = OrderedDict()  # the one used last at the end

    def __len__(self) -> int:
        return len(self._sessions)

    def create(self) -> Session:
        """A new session; raises TooManySessionsError."""
        now = time.monotonic()
        while self._sessions:
            oldest = next(iter(self._sessions.values()))
            if oldest.under_way or now - oldest.used_at < self._idle_timeout_s:
                break
            del self._sessions[oldest.identity]
        if len(self._sessions) >= self._capacity:
            raise TooManySessionsError(f"{self._capacity} sessions are open: delete those that are done")
        session = Session()
        self._sessions[session.identity] = session
        return session

    def get(self, identity: str) -> Session | None:
        """The session, now the one used last; None when there is none."""
        session = self._sessions.get(identity)
        if session is not None:
            session.used_at = time.monotonic()
            self._sessions.move_to_end(identity)
        return session

    def delete(self, session: Session) -> None:
        """Forget ``session`` and end what it generates."""
        self._sessions.pop(session.identity, None)
        for task in session.under_way:
            task.cancel()

"""The pool's view of one worker."""

from __future__ import annotations

import json
import pickle
import socket
import time
from itertools import count

from miles.rewards.pool.job import Result
from miles.rewards.pool.progress import IDLE, LOADING, Progress
from miles.rewards.pool.ticket import Ticket
from miles.rewards.pool.wire import FrameReader, FrameWriter

# Never used twice: what a dead worker left on the progress page must not speak for its successor.
_serials = count(1)


class Member:
    """A worker process, the batch it works on, and what it has answered."""

    def __init__(self, slot: int, pid: int, sock: socket.socket, progress: Progress) -> None:
        self.slot = slot
        self.pid = pid
        self.sock = sock
        self.writer = FrameWriter(sock)
        self.batch: list[Ticket | None] = []
        """Calls in its hands, None where answered; empty when idle."""
        self.num_done = 0
        self.check_at = 0.0
        """When to look whether it is late (``time.monotonic()``)."""
        self._reader = FrameReader(sock)
        self._progress = progress
        self._known: set[int] = set()
        self._serial = 0
        self._given_at = 0.0
        self._shortest_s = 0.0
        self._num_open = 0
        self._recalled: set[int] = set()

    @property
    def num_open(self) -> int:
        """Calls in its hands that have no answer."""
        return self._num_open

    def give(self, batch: list[Ticket]) -> bool:
        """Hand over a batch; whether it is sent completely.  Raises OSError when the worker is gone."""
        new = {ticket.job.key: ticket.job for ticket in batch if ticket.job.key not in self._known}
        self._known.update(new)
        self._serial = next(_serials)
        self.batch = list(batch)
        self._num_open = len(batch)
        self._given_at = time.monotonic()
        self._shortest_s = min(ticket.timeout_s for ticket in batch)
        self.check_at = self._given_at + self._shortest_s
        items = [(ticket.job.key, ticket.arguments) for ticket in batch]
        definitions = [(job.key, job.function, job.packed) for job in new.values()]
        return self.writer.send(pickle.dumps((self._serial, definitions, items), protocol=5))

    def read(self) -> tuple[list[tuple[Ticket, Result]], bool]:
        """New answers, and whether the worker is still there and makes sense."""
        frames, alive = self._reader.read()
        answers: list[tuple[Ticket, Result]] = []
        try:
            for payload in frames:
                serial, replies = json.loads(payload)
                if serial != self._serial and serial not in self._recalled:
                    raise ValueError("an answer to a batch that was not asked")
                answers += [answer for reply in replies if (answer := self._accept(serial, *reply)) is not None]
        except (ValueError, TypeError):  # not from our worker loop, but from what a grader did to it
            alive = False
        if not self._num_open:
            self.batch = []
        return answers, alive

    def _accept(
        self, serial: int, index: int, seconds: float, value: object, error: str | None = None
    ) -> tuple[Ticket, Result] | None:
        asked = serial == self._serial and 0 <= index < len(self.batch)
        ticket = self.batch[index] if asked else None
        if ticket is None:
            if serial in self._recalled:
                return None
            raise ValueError("an answer to a call that was not asked")
        self.batch[index] = None
        self._num_open -= 1
        self.num_done += 1
        return ticket, Result("ok", value, "", seconds) if error is None else Result("error", None, error, seconds)

    def overdue(self, now: float, load_timeout_s: float) -> str | None:
        """Why the worker must die now; None when it need not, with ``check_at`` moved on."""
        note = self._progress.read(self.slot)
        ticket = self._current()
        if ticket is None:
            since, limit, doing = self._given_at, load_timeout_s, "nothing"
        elif note.phase == LOADING:
            since, limit, doing = note.since, load_timeout_s, f"importing {ticket.job.function}"
        else:
            since, limit, doing = note.since, ticket.timeout_s, "grading"
        if now >= since + limit:
            return f"{doing} for more than {limit:g} s"
        # Not later than the earliest deadline of a call that starts right now.
        self.check_at = min(since + limit, now + self._shortest_s)
        return None

    def recall(self, now: float, patience_s: float) -> list[Ticket]:
        """Take back all calls but the one it works on, if it has been at that one for ``patience_s``."""
        current, others = self.unanswered()
        if current is None or not others or now - self._progress.read(self.slot).since < patience_s:
            return []
        self._progress.recall(self.slot, self._serial)
        self._recalled.add(self._serial)
        self.batch = [ticket if ticket is current else None for ticket in self.batch]
        self._num_open = 1
        return others

    def unanswered(self) -> tuple[Ticket | None, list[Ticket]]:
        """The call in the worker's hands, if any, and the others of its batch that have no answer."""
        current = self._current()
        return current, [ticket for ticket in self.batch if ticket is not None and ticket is not current]

    def _current(self) -> Ticket | None:
        note = self._progress.read(self.slot)
        if note.batch != self._serial or note.phase == IDLE or note.index >= len(self.batch):
            return None
        return self.batch[note.index]

"""The pool's view of one worker."""

from __future__ import annotations

import socket
import time
from itertools import accumulate, count

from miles.rewards.pool.batch import write_batch
from miles.rewards.pool.progress import IDLE, LOADING, Note, Progress
from miles.rewards.pool.reply import Reply, read_reply
from miles.rewards.pool.results import Results
from miles.rewards.pool.ticket import Span
from miles.rewards.pool.wire import FrameReader, FrameWriter

_GLANCE_S = 0.05
"""How often to look what a worker is at that does not answer.  It is killed so much after its deadline at most."""

# Never used twice: what a dead worker left on the progress page must not speak for its successor.
_serials = count(1)

Answer = tuple[Span, Results]
"""Calls and their results."""


class Member:
    """A worker process, the batch it works on, and how far it has answered.

    A batch is a list of spans; its calls are numbered through.  The worker answers them in order.
    """

    def __init__(self, slot: int, pid: int, sock: socket.socket, progress: Progress) -> None:
        self.slot = slot
        self.pid = pid
        self.sock = sock
        self.writer = FrameWriter(sock)
        self.num_done = 0
        self.check_at = 0.0
        """When to look whether it is late (``time.monotonic()``)."""
        self._reader = FrameReader(sock)
        self._progress = progress
        self._known: set[int] = set()
        self._serial = 0
        self._spans: list[Span] = []
        self._ends: list[int] = []
        self._next, self._stop = 0, 0
        """Calls whose answers are still wanted: from ``_next`` to ``_stop - 1``."""
        self._seen = Note(0, 0, IDLE)
        self._seen_at = 0.0
        """When its note said first what it says now: the current call started then at the latest."""
        self._glance_s = 0.0
        self._recalled: set[int] = set()

    @property
    def num_open(self) -> int:
        """Calls in its hands that have no answer."""
        return self._stop - self._next

    def give(self, spans: list[Span]) -> bool:
        """Hand over a batch; whether it is sent completely.  Raises OSError when the worker is gone."""
        new = {span.ticket.job.key: span.ticket.job for span in spans if span.ticket.job.key not in self._known}
        self._known.update(new)
        tray = self._progress.tray(self.slot)
        if self._serial in self._recalled:
            tray = tray[:0]  # it may have begun to read another call of that batch: this one goes in the message
        self._serial = next(_serials)
        self._spans = spans
        self._ends = list(accumulate(span.size for span in spans))
        self._next, self._stop = 0, self._ends[-1]
        self._glance_s = min(_GLANCE_S, min(span.ticket.timeout_s for span in spans) / 4)
        self._seen, self._seen_at = Note(0, 0, IDLE), time.monotonic()
        self.check_at = self._seen_at + self._glance_s
        return self.writer.send(write_batch(self._serial, list(new.values()), spans, tray))

    def read(self) -> tuple[list[Answer], list[Span], bool]:
        """New answers, calls the worker gave back, and whether it is still there and makes sense."""
        frames, alive = self._reader.read()
        answers: list[Answer] = []
        returned: list[Span] = []
        try:
            for payload in frames:
                reply = read_reply(payload)
                answers += self._accept(reply)
                if reply.stopped:
                    returned += self._stopped(reply.batch)
        except (ValueError, TypeError, LookupError):  # not from our worker loop, but from what a grader did to it
            alive = False
        return answers, returned, alive

    def _accept(self, reply: Reply) -> list[Answer]:
        first, stop = reply.first, reply.first + len(reply.results)
        if reply.batch in self._recalled:
            if reply.batch != self._serial:
                return []
            first, stop = max(first, self._next), min(stop, self._stop)
        elif reply.batch != self._serial or first != self._next or stop > self._stop:
            raise ValueError("an answer to a call that was not asked")
        answers, at = [], first - reply.first
        for span in self._pieces(first, stop):
            answers.append((span, reply.results[at : at + span.size]))
            at += span.size
            self.num_done += span.size
        self._next = max(self._next, stop)
        return answers

    def _stopped(self, batch: int) -> list[Span]:
        """The worker gave ``batch`` up: the call that was thought to be in its hands, if it had not begun it."""
        if batch not in self._recalled:
            raise ValueError("a batch that was given up without being recalled")
        self._recalled.discard(batch)
        if batch != self._serial:
            return []
        returned = self.open_spans()
        self._next = self._stop
        return returned

    def _pieces(self, first: int, stop: int) -> list[Span]:
        """Calls ``first`` to ``stop - 1`` of the batch."""
        pieces = []
        for span, end in zip(self._spans, self._ends):
            start = end - span.size
            low, high = max(first, start), min(stop, end)
            if low < high:
                pieces.append(span.part(low - start, high - start))
        return pieces

    def overdue(self, now: float, load_timeout_s: float) -> str | None:
        """Why the worker must die now; None when it need not, with ``check_at`` moved on."""
        note = self._look(now)
        if note.batch != self._serial or note.phase == IDLE or note.index >= self._ends[-1]:
            limit, doing = load_timeout_s, "nothing"
        elif note.phase == LOADING:
            limit, doing = load_timeout_s, f"importing {self._span_of(note.index).ticket.job.function}"
        else:
            limit, doing = self._span_of(note.index).ticket.timeout_s, "grading"
        if now >= self._seen_at + limit:
            return f"{doing} for more than {limit:g} s"
        self.check_at = min(now + self._glance_s, self._seen_at + limit)
        return None

    def recall(self, now: float, patience_s: float) -> list[Span]:
        """Take back all calls but the one it works on, if it has been at that one for ``patience_s``."""
        if self._current(self._look(now)) is None or now - self._seen_at < patience_s:
            return []
        self._progress.recall(self.slot, self._serial)
        self._recalled.add(self._serial)
        current = self._current(self._progress.read(self.slot))  # again: it may have gone on before it could know
        others = self._others(current)
        self._next, self._stop = (self._stop, self._stop) if current is None else (current, current + 1)
        return others

    def _look(self, now: float) -> Note:
        note = self._progress.read(self.slot)
        if note != self._seen:
            self._seen, self._seen_at = note, now
        return note

    def unanswered(self) -> tuple[Span | None, list[Span]]:
        """The call in the worker's hands, if any, and the others of its batch that have no answer."""
        current = self._current(self._progress.read(self.slot))
        return None if current is None else self._span_of(current), self._others(current)

    def open_spans(self) -> list[Span]:
        """Its calls that have no answer."""
        return self._pieces(self._next, self._stop)

    def _others(self, current: int | None) -> list[Span]:
        if current is None:
            return self.open_spans()
        return [*self._pieces(self._next, current), *self._pieces(current + 1, self._stop)]

    def _span_of(self, call: int) -> Span:
        return self._pieces(call, call + 1)[0]

    def _current(self, note: Note) -> int | None:
        if note.batch != self._serial or note.phase == IDLE or not self._next <= note.index < self._stop:
            return None
        return note.index

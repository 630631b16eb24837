"""What goes into the pool."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from itertools import count
from typing import Any

_ids = count(1)


@dataclass(frozen=True, slots=True)
class Job:
    """A function that workers call, by name: ``package.module:attribute``.

    ``bound`` are leading arguments that are sent to each worker only once.
    """

    function: str
    bound: tuple[Any, ...] = ()
    timeout_s: float | None = None
    """Deadline of one call; None: the pool's."""
    key: int = field(default_factory=lambda: next(_ids), init=False)
    packed: bytes = field(init=False, repr=False)
    """``bound``, pickled.  Making a job fails when that is not possible."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "packed", pickle.dumps(self.bound, protocol=5))


@dataclass(frozen=True, slots=True)
class Limits:
    """What a worker may use up.  The defaults suit graders that read text; a user's own function may need more."""

    memory_bytes: int | None = 1 << 30
    """Private memory of one worker; None: no limit."""
    write_files: bool = False
    """Whether a worker may write to files."""
    show_output: bool = False
    """Whether what a worker prints reaches the terminal."""


OPEN_LIMITS = Limits(memory_bytes=None, write_files=True, show_output=True)
"""For functions of the user's own."""

"""Writing a training state while training waits, or beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from miles.core.driver.background import Background


class Writer:
    """Writes at once, or in a thread while training goes on.

    The thread's exchanges between ranks have a ``group`` of their own, since those of training go on as well; None: the
    group of all ranks, or there is one rank.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, in_background: bool) -> None:
        self.group = group
        self.in_background = in_background
        self._writing: Background[None] | None = None

    @classmethod
    def of_ranks(cls, *, in_background: bool) -> Writer:
        """The writer of all ranks.  Collective."""
        group = dist.new_group(backend="gloo") if in_background and dist.is_initialized() else None
        return cls(group, in_background=in_background)

    def write(self, write: Callable[[], None]) -> None:
        """Call ``write``, or begin to; in the background it must use nothing that training changes.  Collective."""
        self.finish()
        if self.in_background:
            self._writing = Background(write, name="checkpoint-tensors")
        else:
            write()

    def finish(self) -> None:
        """Return when everything is on disk; raise what went wrong."""
        if self._writing is not None:
            self._writing.result()

"""Several sets of weights for one model: copies in host memory, put into the model when they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

Copies = dict[str, torch.Tensor]


class TaggedWeights:
    """This rank's part of each set, under a tag.  The set in the model has none.

    ``tensors`` gives the model's own tensors by name, those of this rank alone, whenever they are to be read or filled.
    """

    def __init__(self, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        self._tensors = tensors
        self._copies: dict[str, Copies] = {}

    def __contains__(self, tag: str) -> bool:
        return tag in self._copies

    def keep(self, tag: str) -> None:
        """Copy the weights that are in the model now."""
        self._copies[tag] = self._current()

    def drop(self, tag: str) -> None:
        """Free the copy."""
        del self._copies[tag]

    def of(self, tag: str) -> Copies:
        """The copies kept under ``tag``, by parameter name."""
        return self._copies[tag]

    @contextmanager
    def swapped_in(self, tag: str) -> Iterator[None]:
        """Let the model have the weights of ``tag`` for a while."""
        own = self._current()
        self._fill(self._copies[tag])
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _fill(self, copies: Copies) -> None:
        for name, tensor in self._tensors().items():
            tensor.copy_(copies[name], non_blocking=True)

    def _current(self) -> Copies:
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._tensors().items()}

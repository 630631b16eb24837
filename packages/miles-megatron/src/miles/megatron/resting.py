"""A rank's state in host memory while engines generate, storage by storage, so that every view of one stays as it is.

On a CPU the same happens from host memory to host memory: nothing is gained, and what an accelerator would get back is
counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class _Resting:
    """The memory of one storage, which is empty now."""

    storage: torch.UntypedStorage
    size: int
    values: torch.Tensor | None
    """Bytes in host memory; None: zeros."""


class RestingMemory:
    """What is in host memory now."""

    def __init__(self) -> None:
        self._resting: list[_Resting] = []

    def take(self, tensors: Iterable[torch.Tensor], zeros: Iterable[torch.Tensor] = ()) -> int:
        """Empty the storages of ``tensors``, and of ``zeros``, whose values nobody needs; the bytes of both."""
        _wait_for_device()
        taken = sum(self._take(storage, keep=False) for storage in _storages(zeros))
        taken += sum(self._take(storage, keep=True) for storage in _storages(tensors))
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # engines are other processes
        return taken

    def give_back(self) -> None:
        """Fill them as they were."""
        for rest in self._resting:
            rest.storage.resize_(rest.size)
            whole = _bytes_of(rest.storage)
            whole.zero_() if rest.values is None else whole.copy_(rest.values, non_blocking=True)
        _wait_for_device()
        self._resting.clear()

    def _take(self, storage: torch.UntypedStorage, *, keep: bool) -> int:
        size: int = storage.nbytes()
        self._resting.append(_Resting(storage, size, _on_host(storage) if keep else None))
        storage.resize_(0)
        return size


def _wait_for_device() -> None:
    """Have all streams of the accelerator, if there is one, done what they were told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _storages(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    """Those that have memory, each once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return list({storage.data_ptr(): storage for storage in storages if storage.nbytes()}.values())


def _on_host(storage: torch.UntypedStorage) -> torch.Tensor:
    """A copy of the bytes, from which an accelerator reads fast."""
    whole = _bytes_of(storage)
    host = torch.empty(whole.shape, dtype=torch.uint8, pin_memory=whole.is_cuda)
    return host.copy_(whole)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

"""A shared-memory file that a trainer fills again and again, mapped once."""

from __future__ import annotations

import mmap
import os
import warnings

import torch

from miles.core.errors import EngineError


class SharedFile:
    """Keeps the mapping of the last file: to map pages anew costs more than to copy them."""

    def __init__(self) -> None:
        self._identity: tuple[int, int, int] | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def bytes_of(self, path: str, num_bytes: int) -> torch.Tensor:
        """uint8 view [>= num_bytes] of the file; to be read only.  EngineError when it is missing or shorter."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise EngineError(f"cannot open the bucket {path}: {error.strerror}") from error
        try:
            found = os.fstat(descriptor)
            if found.st_size < num_bytes:
                raise EngineError(f"the bucket {path} is shorter than its {num_bytes} bytes")
            identity = (found.st_dev, found.st_ino, found.st_size)
            if identity != self._identity:
                self._bytes, self._identity = _mapped(descriptor, found.st_size), identity
        finally:
            os.close(descriptor)
        return self._bytes

    def forget(self) -> None:
        """Unmap the file."""
        self._identity, self._bytes = None, torch.empty(0, dtype=torch.uint8)


def _mapped(descriptor: int, size: int) -> torch.Tensor:
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    mapping = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8)

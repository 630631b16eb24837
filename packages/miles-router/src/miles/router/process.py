"""What a router asks of its process: many files, and memory that is not given back only to be fetched again."""

from __future__ import annotations

import ctypes
import resource

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT_FREE_BYTES = 16 * 1024 * 1024
_OWN_MAPPING_BYTES = 2 * 1024 * 1024


def raise_file_limit() -> None:
    """Allow as many open connections as the system permits: each request takes two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def keep_freed_memory() -> None:
    """Keep some freed memory, with glibc.

    Pieces of long bodies are a quarter of a megabyte each.  Returning each to the system and taking it back costs more
    than copying it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE_BYTES)

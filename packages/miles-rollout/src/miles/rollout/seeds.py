"""Sampling seeds that depend on the run's seed and the sample alone, never on timing."""

from __future__ import annotations

import hashlib
import struct
from typing import Literal

Stream = Literal["rollout", "eval"]


def sampling_seed(rollout_seed: int, index: int, stream: Stream = "rollout") -> int:
    """31 bits for sample ``index``; evaluation samples have a stream of their own and the same seeds every time."""
    key = struct.pack("<qq", rollout_seed, index)
    digest = hashlib.blake2b(key, digest_size=4, person=stream.encode()).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF

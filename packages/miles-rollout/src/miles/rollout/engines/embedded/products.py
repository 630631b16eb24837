"""Products of many small matrices, which are what attention over separate sequences consists of.

numpy's matrix library multiplies matrices this small where they lie; torch's packs them first, which takes three to
five times as long.  A row's result has the same bits in every product whose ``left`` has as many rows.

R = rows, X = summed, Y = columns.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float32]
_WORTH_SHARING = 1 << 20
"""Multiplications from which on waking threads costs less than they save."""


def multiply(left: Floats, right: Floats, out: Floats) -> None:
    """Write ``left`` [..., R, X] @ ``right`` [..., X, Y] to ``out`` [..., R, Y]; torch's number of threads share it."""
    workers = torch.get_num_threads()
    if workers == 1 or out.size * left.shape[-1] < _WORTH_SHARING:
        np.matmul(left, right, out=out)
        return
    axis = int(np.argmax(left.shape[:-2]))
    cuts = np.linspace(0, left.shape[axis], workers + 1).astype(int)

    def part(first: int, last: int) -> None:
        index = (*[slice(None)] * axis, slice(first, last))
        np.matmul(left[index], right[index] if right.shape[axis] > 1 else right, out=out[index])

    list(_threads(workers).map(part, cuts[:-1], cuts[1:]))


@lru_cache(maxsize=1)
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="attention")

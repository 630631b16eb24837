"""The archives that ``torch.save`` makes of tensors: values as they are in memory, and what stands around them."""

from __future__ import annotations

import io
import os
import struct
import tempfile
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from typing import IO

import torch
from torch.serialization import get_crc32_options, set_crc32_options, skip_data

_LOCAL_HEADER = 30
"""Bytes of a record of a zip archive before its name, further fields and data."""
_NAME_LENGTH = 26
"""Where the lengths of name and further fields are in them."""


@dataclass(frozen=True, slots=True)
class Frame:
    """An archive without its values."""

    before: bytes
    after: bytes


@lru_cache(maxsize=1024)
def frame_of(dtype: torch.dtype, shape: torch.Size) -> Frame:
    """What ``torch.save`` writes before and behind the values of a contiguous tensor, without checksums.

    It is the same for all tensors of a shape, and to write it anew takes longer than a megabyte of values.
    """
    summed = get_crc32_options()
    with tempfile.TemporaryFile() as file:
        set_crc32_options(False)
        try:
            with skip_data():  # leaves a hole in the file, and never touches the memory of the tensor
                torch.save(torch.empty(shape, dtype=dtype), file)
        finally:
            set_crc32_options(summed)
        header = values_header(file)
        file.seek(0)
        before = file.read(header + _LOCAL_HEADER)
        before += file.read(values_start(before, header) - len(before))
        file.seek(shape.numel() * dtype.itemsize, os.SEEK_CUR)
        return Frame(before, file.read())


def values_header(archive: IO[bytes] | io.RawIOBase) -> int:
    """Where the record of the only storage begins in ``archive``."""
    with zipfile.ZipFile(archive) as records:
        (record,) = (record for record in records.infolist() if record.filename.endswith("/data/0"))
    return record.header_offset


def values_start(archive: bytes | memoryview, header: int) -> int:
    """Where the values of the record are that begins at ``header``."""
    name: int
    extra: int
    name, extra = struct.unpack_from("<HH", archive, header + _NAME_LENGTH)
    return header + _LOCAL_HEADER + name + extra

"""Tensors of a Hugging Face checkpoint, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from miles.core.errors import TrainingError
from miles.megatron.quantized import block_fp8_values, mxfp4_values

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MXFP4_BLOCKS, _MXFP4_SCALES = "_blocks", "_scales"
_FP8_SCALES = "_scale_inv"


class HfTensors:
    """The safetensors files of a directory.  Nothing is read before it is asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file_of = self._index()
        self._open = lru_cache(maxsize=8)(self._opened)
        self._fp8_block = _fp8_block(directory)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    def get(self, name: str) -> torch.Tensor:
        """The tensor ``name``, in the dtype of the file, or in bf16 where that is quantized."""
        return self._values(name, lambda file, stored: file.get_tensor(stored))

    def get_part(self, name: str, index: int) -> torch.Tensor:
        """``tensor[index]`` of the tensor ``name``; nothing else of it is read."""
        return self._values(name, lambda file, stored: file.get_slice(stored)[index])

    def _values(self, name: str, read: Callable[[Any, str], torch.Tensor]) -> torch.Tensor:
        """What ``read`` gets from a file, as values."""
        blocks, scales = name + _MXFP4_BLOCKS, name + _FP8_SCALES
        if name not in self._file_of and blocks in self._file_of:
            packed = (read(self._file(stored), stored) for stored in (blocks, name + _MXFP4_SCALES))
            return mxfp4_values(*packed).mT  # published with the inputs of a weight last, and read with them first
        values = read(self._file(name), name)
        if self._fp8_block is not None and scales in self._file_of:
            return block_fp8_values(values, read(self._file(scales), scales), self._fp8_block)
        return values

    def _file(self, name: str) -> Any:
        if name not in self._file_of:
            raise TrainingError(f"{self._directory} has no tensor {name}, which a model of this architecture needs")
        return self._open(self._file_of[name])

    def _index(self) -> dict[str, str]:
        index = self._directory / _INDEX
        if index.is_file():
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        if not (self._directory / _SINGLE).is_file():
            raise TrainingError(f"{self._directory} has neither {_SINGLE} nor {_INDEX}: it holds no weights")
        return dict.fromkeys(self._opened(_SINGLE).keys(), _SINGLE)

    def _opened(self, file: str) -> Any:
        return safe_open(self._directory / file, framework="pt")


def _fp8_block(directory: Path) -> tuple[int, int] | None:
    """Rows and columns that share a scale of FP8.  Raises TrainingError for weights whose values nothing here knows."""
    config = directory / "config.json"
    found = json.loads(config.read_text(encoding="utf-8")).get("quantization_config") if config.is_file() else None
    if not found or found.get("quant_method") == "mxfp4":
        return None
    if found.get("quant_method") == "fp8" and found.get("weight_block_size"):
        rows, columns = found["weight_block_size"]
        return rows, columns
    raise TrainingError(
        f"{directory} is quantized ({found.get('quant_method')}): the megatron backend reads weights in MXFP4, and in "
        "FP8 with scales of blocks (weight_block_size). Give a checkpoint in bf16"
    )

"""Tensors of a Hugging Face checkpoint, read one at a time."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from miles.core.errors import TrainingError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class HfTensors:
    """The safetensors files of a directory.  Nothing is read before it is asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file_of = self._index()
        self._open = lru_cache(maxsize=8)(self._opened)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    def get(self, name: str) -> torch.Tensor:
        """The tensor ``name``, in the dtype of the file."""
        tensor: torch.Tensor = self._file(name).get_tensor(name)
        return tensor

    def get_part(self, name: str, index: int) -> torch.Tensor:
        """``tensor[index]`` of the tensor ``name``; nothing else of it is read."""
        part: torch.Tensor = self._file(name).get_slice(name)[index]
        return part

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

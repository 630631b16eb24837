"""A model on disk in either format, read parameter by parameter.  The model itself is never in memory."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from miles.core.errors import CheckpointError, TrainingError
from miles.megatron import checkpoint
from miles.megatron.building import Blueprint
from miles.megatron.conversion import in_order, named_tensors, stored_parts
from miles.megatron.hf_files import HfTensors
from miles.megatron.model_map import Place
from miles.megatron.parameters import local_parameters


@dataclass(frozen=True, slots=True)
class Parameter:
    """One of the model's, without its values."""

    name: str
    place: Place
    shape: torch.Size
    dtype: torch.dtype
    stored_as: ShardedTensor | ShardedTensorFactory

    def pieces(self, values: torch.Tensor) -> list[ShardedTensor]:
        """``values`` as the pieces that a ``torch_dist`` checkpoint has of them."""
        entry = copy(self.stored_as)
        entry.data = values
        return list(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]

    def joined(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        """The values of which ``pieces`` are the pieces."""
        if isinstance(self.stored_as, ShardedTensorFactory):
            joined: torch.Tensor = self.stored_as.merge_fn(pieces)
            return joined
        (piece,) = pieces
        return piece


class Outline:
    """The parameters of a model of one rank, in the order of a Hugging Face checkpoint's tensors."""

    def __init__(self, blueprint: Blueprint, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            (chunk,) = blueprint.build()
        self.dtype = dtype
        (self.state,) = checkpoint.model_state([chunk]).values()
        """What ``dist_checkpointing`` saves of it, without values."""
        tensors = {parameter.name: parameter.tensor for parameter in local_parameters([chunk])}
        self.parameters = [
            Parameter(
                name=name,
                place=blueprint.weights.place(name),
                shape=tensors[name].shape,
                dtype=tensors[name].dtype,
                stored_as=self.state[name],
            )
            for name in in_order(list(tensors), blueprint.weights)
        ]

    def hf_outline(self) -> list[tuple[str, torch.Tensor]]:
        """Names of the Hugging Face tensors, with tensors of their shapes and dtypes."""
        empty = ((one.place, torch.empty(one.shape, dtype=one.dtype, device="meta")) for one in self.parameters)
        return list(named_tensors(empty, self.dtype))


class HfValues:
    """Values of parameters from a Hugging Face checkpoint."""

    def __init__(self, directory: Path) -> None:
        self._tensors = HfTensors(directory)

    def of(self, parameter: Parameter) -> torch.Tensor:
        """Raises TrainingError when they have another shape."""
        values = parameter.place.layout.join(stored_parts(self._tensors, parameter.place))
        if values.shape != parameter.shape:
            raise TrainingError(
                f"{', '.join(parameter.place.hf_names)} make a tensor of shape {list(values.shape)} for "
                f"{parameter.name}, which has shape {list(parameter.shape)}: config.json and weights contradict "
                "each other"
            )
        return values.to(parameter.dtype)


class TorchDistValues:
    """Values of parameters from a ``torch_dist`` checkpoint of whatever parallel layout."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            self._metadata = FileSystemReader(directory).read_metadata()
        except OSError as error:
            raise CheckpointError(f"{directory} cannot be read: {error}") from error
        self._files: dict[str, Any] = {}

    def of(self, parameter: Parameter) -> torch.Tensor:
        """Raises CheckpointError when the checkpoint has not all of them."""
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        return parameter.joined([self._piece(piece) for piece in parameter.pieces(empty)])

    def named(self, outline: Outline) -> Iterator[tuple[str, torch.Tensor]]:
        """All Hugging Face tensors of the model, one at a time."""
        return named_tensors(((one.place, self.of(one)) for one in outline.parameters), outline.dtype)

    def _piece(self, piece: ShardedTensor) -> torch.Tensor:
        stored = self._metadata.state_dict_metadata.get(piece.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"{self._directory} has no {piece.key}: it is of a model of another architecture")
        for chunk in stored.chunks:
            if tuple(chunk.offsets) == tuple(piece.global_offset) and tuple(chunk.sizes) == tuple(piece.local_shape):
                return self._chunk(piece.key, chunk)
        return self._assembled(piece, stored)

    def _assembled(self, piece: ShardedTensor, stored: TensorStorageMetadata) -> torch.Tensor:
        """From the parts that several ranks wrote.  Padding of the vocabulary may be of any length."""
        values = torch.zeros(piece.local_shape, dtype=stored.properties.dtype)
        found = 0
        for chunk in stored.chunks:
            here, there = _overlap(piece, chunk)
            part = self._chunk(piece.key, chunk)[there]
            values[here] = part
            found += part.numel()
        if found < values.numel() and not piece.allow_shape_mismatch:
            raise CheckpointError(
                f"{self._directory}: {piece.key} has shape {list(stored.size)}, and the model has one of "
                f"{list(piece.global_shape)}"
            )
        return values

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        where = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        file = self._files.get(where.relative_path)
        if file is None:
            file = self._files[where.relative_path] = (self._directory / where.relative_path).open("rb")
        file.seek(where.offset)
        tensor: torch.Tensor = torch.load(BytesIO(file.read(where.length)), map_location="cpu", weights_only=True)
        return tensor

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def _overlap(piece: ShardedTensor, chunk: ChunkStorageMetadata) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """What both cover, as it lies in the piece and in the chunk; empty slices where they share nothing."""
    here, there = [], []
    for start, size, first, length in zip(
        piece.global_offset, piece.local_shape, chunk.offsets, chunk.sizes, strict=True
    ):
        low, high = max(start, first), min(start + size, first + length)
        high = max(low, high)
        here.append(slice(low - start, high - start))
        there.append(slice(low - first, high - first))
    return tuple(here), tuple(there)

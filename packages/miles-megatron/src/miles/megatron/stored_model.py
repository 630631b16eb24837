"""A model on disk in either format, read parameter by parameter.  The model itself is never in memory."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from miles.core.errors import CheckpointError, TrainingError
from miles.megatron import checkpoint
from miles.megatron.building import Blueprint
from miles.megatron.conversion import in_order, named_parts, named_tensors, stored_parts
from miles.megatron.hf_files import HfTensors
from miles.megatron.mapped_items import MappedItems
from miles.megatron.model_map import Place
from miles.megatron.parameters import local_parameters


@dataclass(frozen=True)
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

    @cached_property
    def has_tensors_as_pieces(self) -> bool:
        """Whether the pieces are the Hugging Face tensors, as those of gate and up projection are."""
        # Views of it do not begin at zero, as copies of parts of it do.
        whole = torch.empty(self.shape.numel() + 1, dtype=self.dtype, device="meta")[1:].view(self.shape)
        pieces, tensors = [piece.data for piece in self.pieces(whole)], self.place.layout.split(whole)
        return [_extent(piece) for piece in pieces] == [_extent(tensor) for tensor in tensors]

    def joined(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        """The values of which ``pieces`` are the pieces."""
        if isinstance(self.stored_as, ShardedTensorFactory):
            joined: torch.Tensor = self.stored_as.merge_fn(pieces)
            return joined
        (piece,) = pieces
        return piece


def _extent(view: torch.Tensor) -> tuple[object, ...]:
    return view.storage_offset(), view.shape, view.stride()


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

    def pieces(self, parameter: Parameter) -> list[torch.Tensor]:
        """Those that a ``torch_dist`` checkpoint has.  Raises TrainingError when the values have another shape."""
        tensors = stored_parts(self._tensors, parameter.place)
        if parameter.has_tensors_as_pieces:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            for piece, tensor in zip(parameter.pieces(empty), tensors, strict=True):
                _require(parameter, tensor, piece.data.shape)
            return [tensor.to(parameter.dtype) for tensor in tensors]
        values = parameter.place.layout.join(tensors)
        _require(parameter, values, parameter.shape)
        return [piece.data for piece in parameter.pieces(values.to(parameter.dtype))]


def _require(parameter: Parameter, values: torch.Tensor, shape: torch.Size) -> None:
    if values.shape != shape:
        raise TrainingError(
            f"{', '.join(parameter.place.hf_names)} make a tensor of shape {list(values.shape)} for "
            f"{parameter.name}, which has shape {list(shape)}: config.json and weights contradict each other"
        )


class TorchDistValues:
    """Values of parameters from a ``torch_dist`` checkpoint of whatever parallel layout."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            self._metadata = FileSystemReader(directory).read_metadata()
        except OSError as error:
            raise CheckpointError(f"{directory} cannot be read: {error}") from error
        self._files: dict[str, MappedItems] = {}

    def named(self, outline: Outline) -> Iterator[tuple[str, torch.Tensor]]:
        """All Hugging Face tensors of the model, one at a time.  Raises CheckpointError when one is missing."""
        return named_parts(((one.place, self._tensors(one)) for one in outline.parameters), outline.dtype)

    def _tensors(self, parameter: Parameter) -> list[torch.Tensor]:
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        pieces = [self._piece(piece) for piece in parameter.pieces(empty)]
        return pieces if parameter.has_tensors_as_pieces else parameter.place.layout.split(parameter.joined(pieces))

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
        if where.relative_path not in self._files:
            self._files[where.relative_path] = MappedItems(self._directory / where.relative_path)
        return self._files[where.relative_path].tensor(where.offset, where.length)


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

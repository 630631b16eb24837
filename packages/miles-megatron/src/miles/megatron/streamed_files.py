"""Checkpoints written tensor by tensor, in both formats."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
from miles.core.training.writing import Writer
from miles.megatron import checkpoint
from miles.megatron.archives import frame_of
from miles.megatron.deferred_tensors import DeferredTensors
from miles.megatron.stored_model import HfValues, Outline, Parameter

_INDEX = "model.safetensors.index.json"
_MAX_FILE_BYTES = 4 * 2**30
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_torch_dist(directory: Path, outline: Outline, source: HfValues) -> None:
    """Write the weights of ``source`` as ``checkpoint.write`` writes those of a model."""
    target = directory / checkpoint.WEIGHTS
    target.mkdir(parents=True)
    pieces = {
        (piece.key, tuple(piece.global_offset)): (parameter, number)
        for parameter in outline.parameters
        for number, piece in enumerate(parameter.pieces(_empty(parameter)))
    }
    tensors = _StreamedTensors(_Pieces(source, pieces))
    state = {"model": outline.state}
    dist_checkpointing.save(
        state,
        str(target),
        sharded_strategy=tensors,
        content_metadata=checkpoint.content(),
        validate_access_integrity=False,  # of what several ranks have; here is one, which has everything
    )
    tensors.write()


def _empty(parameter: Parameter) -> torch.Tensor:
    return torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")


class _Pieces:
    """The pieces of a ``torch_dist`` checkpoint.  Those of one parameter are asked for one after another."""

    def __init__(self, source: HfValues, parameters: dict[tuple[str, tuple[int, ...]], tuple[Parameter, int]]) -> None:
        self._source = source
        self._parameters = parameters
        self._last: tuple[Parameter | None, list[torch.Tensor]] = (None, [])

    def get(self, key: str, offset: tuple[int, ...]) -> torch.Tensor:
        parameter, number = self._parameters[key, offset]
        if self._last[0] is not parameter:
            self._last = None, []  # two parameters are never in memory
            self._last = parameter, self._source.pieces(parameter)
        return self._last[1][number]


class _StreamedTensors(DeferredTensors):
    """Asks for each tensor when it is written."""

    def __init__(self, pieces: _Pieces) -> None:
        super().__init__(Writer(None, in_background=False), copies=False)
        self._pieces = pieces

    def write(self) -> None:
        save_alone(self._tensors, StreamingWriter(self._directory), _StreamingPlanner(self._pieces))


def save_alone(state: dict[str, Any], writer: dcp.StorageWriter, planner: SavePlanner) -> None:
    """``dcp.save`` in one process, without what that logs about each tensor: it takes as long as all the planning."""
    writer.set_up_storage_writer(True)
    planner.set_up_planner(state, writer.storage_meta(), True)
    local = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([local])
    (plan,) = writer.prepare_global_plan(plans)
    writer.finish(metadata, [writer.write_data(planner.finish_plan(plan), planner).wait()])


class StreamingWriter(dcp.FileSystemWriter):  # type: ignore[misc]
    """Writes item after item into one file.  torch's writer holds all tensors of a file until it is complete.

    There are no checksums: the conversion compares every value, and a checkpoint of a run has a manifest.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, single_file_per_rank=True, sync_files=False)
        self._directory = directory

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        results, end = [], 0
        with (self._directory / name).open("wb") as file:
            for item in plan.items:
                start, end = end, end + _write_item(file, planner.resolve_data(item))
                where = _StorageInfo(name, start, end - start)
                results.append(WriteResult(item.index, size_in_bytes=end - start, storage_data=where))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _write_item(file: BinaryIO, value: torch.Tensor | io.BytesIO) -> int:
    """Its length in the file."""
    if isinstance(value, io.BytesIO):
        return file.write(value.getbuffer())
    frame = frame_of(value.dtype, value.shape)
    return file.write(frame.before) + file.write(_bytes(value.contiguous())) + file.write(frame.after)


class _StreamingPlanner(MCoreSavePlanner):  # type: ignore[misc]
    def __init__(self, pieces: _Pieces) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._pieces = pieces

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            data: io.BytesIO = super().resolve_data(write_item)
            return data
        return self._pieces.get(write_item.index.fqn, tuple(write_item.index.offset))


def _bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.view(-1).view(torch.uint8).numpy())


def write_safetensors(
    directory: Path, outline: Sequence[tuple[str, torch.Tensor]], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Write ``tensors`` in files of at most 4 GiB (or one tensor), and their index when there are several.

    ``outline`` has tensors of the same names, shapes and dtypes in the same order.
    """
    shards = list(_shards(outline))
    names = [_file_name(number, len(shards)) for number in range(len(shards))]
    values = iter(tensors)
    for shard, name in zip(shards, names, strict=True):
        with (directory / name).open("wb") as file:
            _write_file(file, shard, values)
    if len(shards) > 1:
        weight_map = {name: file for shard, file in zip(shards, names, strict=True) for name, _ in shard}
        size = sum(tensor.nbytes for shard in shards for _, tensor in shard)
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2)
        (directory / _INDEX).write_text(text + "\n", encoding="utf-8")


Shard = list[tuple[str, torch.Tensor]]


def _shards(outline: Sequence[tuple[str, torch.Tensor]]) -> Iterator[Shard]:
    shard: Shard = []
    size = 0
    for name, tensor in outline:
        if shard and size + tensor.nbytes > _MAX_FILE_BYTES:
            yield shard
            shard, size = [], 0
        shard.append((name, tensor))
        size += tensor.nbytes
    yield shard


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_file(file: BinaryIO, shard: Shard, values: Iterator[tuple[str, torch.Tensor]]) -> None:
    """The format of https://github.com/huggingface/safetensors: length of the header, header, tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in shard:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for (expected, like), (name, tensor) in zip(shard, values, strict=False):
        assert (name, tensor.shape, tensor.dtype) == (expected, like.shape, like.dtype), f"{name} for {expected}"
        file.write(_bytes(tensor.contiguous()))

"""Weights between a Hugging Face checkpoint and the ranks of a Megatron-Core model, one parameter at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from miles.core.errors import TrainingError
from miles.megatron.hf_files import HfTensors
from miles.megatron.layouts import Replicated
from miles.megatron.model_map import Place, WeightMap
from miles.megatron.parameters import LocalParameter, local_parameters


@torch.no_grad()  # type: ignore[untyped-decorator]
def load_weights(chunks: Sequence[nn.Module], weights: WeightMap, source: HfTensors) -> None:
    """Fill this rank's part of the model from ``source``.  Local: every rank reads what it holds."""
    for parameter in local_parameters(chunks):
        place = weights.place(parameter.name)
        full = place.layout.join(stored_parts(source, place))
        count = dist.get_world_size(parameter.group)
        part = place.layout.shard(full, dist.get_rank(parameter.group), count)
        if part.shape != parameter.tensor.shape:
            raise TrainingError(
                f"{', '.join(place.hf_names)} make a tensor of shape {list(part.shape)} for {parameter.name}, "
                f"which has shape {list(parameter.tensor.shape)}: config.json and weights contradict each other"
            )
        parameter.tensor.copy_(part)


def mark_parts(chunks: Sequence[nn.Module], weights: WeightMap) -> None:
    """Say which weights, or parts of one, this rank alone has, so that norms of gradients count a weight once.

    Megatron-Core does so only when it initializes the weights.
    """
    for parameter in local_parameters(chunks):
        alone = dist.get_world_size(parameter.group) == 1
        if alone or type(weights.place(parameter.name).layout) is not Replicated:
            parameter.tensor.tensor_model_parallel = True


def stored_parts(source: HfTensors, place: Place) -> list[torch.Tensor]:
    """What the checkpoint has of a parameter."""
    if place.stacked:
        return [source.get_part(name, place.index) for name in place.hf_names]
    return [source.get(name) for name in place.hf_names]


def named_tensors(
    parameters: Iterable[tuple[Place, torch.Tensor | None]], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors of whole parameters, empty ones of None.  Stacked ones come one after another."""
    split = (
        (place, [torch.empty(0)] * len(place.hf_names) if full is None else place.layout.split(full))
        for place, full in parameters
    )
    return named_parts(split, dtype)


def named_parts(
    parameters: Iterable[tuple[Place, list[torch.Tensor]]], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors of parameters that have been split into them."""
    stack: list[list[torch.Tensor]] = []
    for place, parts in parameters:
        if place.stacked:
            stack.append(parts)
            if len(stack) < place.stacked:
                continue
            parts = [torch.stack(same) for same in zip(*stack, strict=True)]
            stack = []
        for name, part in zip(place.hf_names, parts, strict=True):
            yield name, part if place.keeps_dtype else part.to(dtype)


def in_order(names: Sequence[str], weights: WeightMap) -> list[str]:
    """The parameters with those of a stacked tensor one after another, where the first of them was."""
    places = {name: weights.place(name) for name in names}
    first: dict[tuple[str, ...], int] = {}
    for number, place in enumerate(places.values()):
        if place.stacked:
            first.setdefault(place.hf_names, number)
    numbers = {name: number for number, name in enumerate(names)}
    return sorted(names, key=lambda name: (first.get(places[name].hf_names, numbers[name]), places[name].index))


@dataclass(frozen=True, slots=True)
class _Holding:
    """One parameter of the whole model, and the first rank that holds it."""

    name: str
    rank: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightGatherer:
    """Brings whole parameters to rank 0 under their Hugging Face names, in the order of the pipeline's stages."""

    def __init__(self, chunks: Sequence[nn.Module], weights: WeightMap) -> None:
        self._local = {parameter.name: parameter for parameter in local_parameters(chunks)}
        self._weights = weights
        holdings = {holding.name: holding for holding in _holdings(self._local)}
        self._holdings = [holdings[name] for name in in_order(list(holdings), weights)]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def named_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Full tensors; on ranks other than 0 empty ones.  One tensor is whole at a time.  Collective."""
        yield from named_tensors(self._whole_parameters(), dtype)

    def _whole_parameters(self) -> Iterator[tuple[Place, torch.Tensor | None]]:
        """Every parameter of the whole model once; its values on rank 0."""
        done: set[str] = set()
        for holding in self._holdings:
            place = self._weights.place(holding.name)
            if not place.stacked:
                if done.issuperset(place.hf_names):
                    continue  # the copy of a tied embedding
                done.update(place.hf_names)
            yield place, self._full(holding, place)

    def _full(self, holding: _Holding, place: Place) -> torch.Tensor | None:
        """The whole parameter, on rank 0."""
        rank = dist.get_rank()
        full = None
        parameter = self._local.get(holding.name)
        if parameter is not None and dist.get_process_group_ranks(parameter.group)[0] == holding.rank:
            full = _gathered(parameter, place)
        if holding.rank == 0:
            return full if rank == 0 else None
        return _moved(full, holding, place)


def _gathered(parameter: LocalParameter, place: Place) -> torch.Tensor:
    """The parameter whole, on all ranks that share it."""
    tensor = parameter.values().contiguous()
    count = dist.get_world_size(parameter.group)
    if count == 1:
        return place.layout.gather([tensor])
    shards = [torch.empty_like(tensor) for _ in range(count)]
    dist.all_gather(shards, tensor, group=parameter.group)
    return place.layout.gather(shards)


def _moved(full: torch.Tensor | None, holding: _Holding, place: Place) -> torch.Tensor | None:
    """From the rank that holds it to rank 0, through host memory."""
    rank = dist.get_rank()
    if rank == holding.rank:
        assert full is not None
        dist.send(torch.tensor(full.shape, dtype=torch.int64), 0)
        dist.send(full.cpu().contiguous(), 0)
    if rank != 0:
        return None
    shape = torch.zeros(len(holding.shape), dtype=torch.int64)
    dist.recv(shape, holding.rank)
    received = torch.empty(shape.tolist(), dtype=holding.dtype)
    dist.recv(received, holding.rank)
    return received


def _holdings(local: dict[str, LocalParameter]) -> list[_Holding]:
    """Every parameter of the whole model once, with the lowest rank that has a part of it.  Collective."""
    own = [(name, tuple(parameter.tensor.shape), parameter.tensor.dtype) for name, parameter in local.items()]
    everyones: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyones, own)
    found: dict[str, _Holding] = {}
    for rank, names in enumerate(everyones):
        for name, shape, dtype in names:
            found.setdefault(name, _Holding(name, rank, shape, dtype))
    return list(found.values())

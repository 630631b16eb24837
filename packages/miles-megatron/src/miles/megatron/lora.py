"""Adapters on a model of Megatron-Core: which layers get one, their first values, and their way to and from disk."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from megatron.core import parallel_state
from miles.core.errors import ConfigError
from miles.core.weights.adapter_form import PARTS, tensor_name
from miles.core.weights.adapters import LoraSpec, initial_a, read_adapter, save_adapter
from miles.megatron.adapted_layers import ADAPTED, AdaptedLinear, Part
from miles.megatron.model_map import Place, WeightMap
from miles.megatron.parameters import local_parameters


@dataclass(frozen=True, slots=True)
class LocalAdapter:
    """One parameter of an adapter, or this rank's part of it."""

    name: str
    """Of the checkpoint's layer, with ``lora_A`` or ``lora_B`` behind."""
    tensor: nn.Parameter
    dim: int | None
    """In which tensor-parallel ranks divide it."""

    def shard(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of the ``whole`` parameter."""
        if self.dim is None:
            return whole
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        return whole.chunk(ranks, self.dim)[parallel_state.get_tensor_model_parallel_rank()]

    def whole(self) -> torch.Tensor:
        """The whole parameter.  Collective among the tensor-parallel ranks."""
        own = self.tensor.detach().contiguous()
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        if self.dim is None or ranks == 1:
            return own
        shards = [torch.empty_like(own) for _ in range(ranks)]
        dist.all_gather(shards, own, group=parallel_state.get_tensor_model_parallel_group())
        return torch.cat(shards, self.dim)


class Adapters:
    """The adapters of a model on this rank.  Building them freezes everything else."""

    def __init__(self, chunks: Sequence[nn.Module], weights: WeightMap, spec: LoraSpec) -> None:
        self._spec = spec
        self._layers: list[AdaptedLinear] = []
        self.local: list[LocalAdapter] = []
        names = {id(parameter.tensor): parameter.name for parameter in local_parameters(chunks)}
        layers: list[str] = []
        for chunk in chunks:
            chunk.requires_grad_(False)
            if chunk.pre_process:
                # Recomputation passes gradients on only from inputs that have one.
                chunk.embedding.register_forward_hook(lambda _, __, output: output.requires_grad_())
            for module in _linear_layers(chunk):
                place = weights.place(names[id(module.weight)])
                layers += (hf_layers := [name.removesuffix(".weight") for name in place.hf_names])
                if any(spec.chooses(name) for name in hf_layers):
                    self._adapt(module, place, hf_layers)
        everyones = _everyones([adapter.name.rpartition(".")[0] for adapter in self.local])
        self.form = spec.form(dict.fromkeys(name for names in everyones for name in names))
        """Of the whole model's adapters."""
        if not self.form.layers:
            raise spec.nothing_chosen("the model", layers)
        self._initialize()

    def tensors(self) -> dict[str, torch.Tensor]:
        """This rank's parameters, by name."""
        return {adapter.name: adapter.tensor for adapter in self.local}

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let the model be the one that training started from."""
        for layer in self._layers:
            layer.active = False
        try:
            yield
        finally:
            for layer in self._layers:
                layer.active = True

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def read(self) -> None:
        """Take the values of ``--lora-adapter-path``, where one is given.  Collective."""
        if self._spec.path is None:
            return
        tensors = read_adapter(self.form.layers, self._spec, self._spec.path)
        for adapter in self.local:
            adapter.tensor.copy_(adapter.shard(tensors[adapter.name]))

    def named(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors as the form names them, on every rank.  Collective."""
        whole = self._whole()
        for layer in self.form.layers:
            for part in PARTS:
                yield tensor_name(layer, part), whole[f"{layer}.{part}"].to(dtype)

    def save(self, base: Path, directory: Path) -> None:
        """Write all of them on rank 0, in PEFT's format.  Collective."""
        whole = self._whole()
        if dist.get_rank() == 0:
            save_adapter(whole, self._spec, base, directory)

    def _whole(self) -> dict[str, torch.Tensor]:
        """The whole parameters of the whole model, by name.  Collective."""
        found = {adapter.name: adapter.whole().cpu() for adapter in self.local}
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        speaks = replica == 0 and parallel_state.get_tensor_model_parallel_rank() == 0
        return {name: tensor for one in _everyones(found if speaks else {}) for name, tensor in one.items()}

    def _adapt(self, module: nn.Module, place: Place, hf_layers: Sequence[str]) -> None:
        if type(module) not in ADAPTED:
            raise ConfigError(
                f"--lora-rank: {type(module).__name__} takes no adapters; they are trained on Megatron-Core's own "
                "linear layers, without Transformer Engine. Leave --lora-rank out, or use --train-backend fsdp"
            )
        module.__class__ = ADAPTED[type(module)]
        divided = "weight" in module.shard_dims and module.shard_dims["weight"] == 0
        counts, order = _order(module, place) if divided else ([module.weight.shape[0]], None)
        parts = [
            Part(layer.rpartition(".")[2], outputs, self._spec.chooses(layer))
            for layer, outputs in zip(hf_layers, counts, strict=True)
        ]
        module.adapt(parts, order, self._spec.rank, self._spec.scale)
        self._layers.append(module)
        for layer, part in zip(hf_layers, parts, strict=True):
            for name in PARTS if part.adapted else ():
                tensor, dim = getattr(module.adapters[part.name], name), module.shard_dims.get(name)
                # Divided weights count in norms on every rank; of whole ones, ranks saw their part of the sequence.
                tensor.tensor_model_parallel = dim is not None or module.tp_group.size() == 1
                tensor.sequence_parallel = dim is None and module.sequence_parallel
                self.local.append(LocalAdapter(f"{layer}.{name}", tensor, dim))

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _initialize(self) -> None:
        """Every layer's A by its own generator, so that values do not depend on who has the layer."""
        for adapter in self.local:
            if adapter.name.endswith("lora_A"):
                generator = torch.Generator().manual_seed(self._spec.seed + zlib.crc32(adapter.name.encode()))
                ranks = parallel_state.get_tensor_model_parallel_world_size() if adapter.dim == 1 else 1
                rank, inputs = adapter.tensor.shape
                adapter.tensor.copy_(adapter.shard(initial_a(rank, inputs * ranks, generator)))


def _linear_layers(chunk: nn.Module) -> Iterator[nn.Module]:
    """Those of the decoder that every token goes through; experts have none."""
    for module in chunk.decoder.layers.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2 and hasattr(module, "tp_group") and not module.is_expert:
            yield module


def _order(module: nn.Module, place: Place) -> tuple[list[int], torch.Tensor | None]:
    """How many of this rank's outputs belong to each of the checkpoint's layers, and where they are."""
    ranks, rank = module.tp_group.size(), module.tp_group.rank()
    everything = torch.arange(module.weight.shape[0] * ranks)
    own = place.layout.shard(everything, rank, ranks)
    in_file_order = torch.cat([rows.chunk(ranks)[rank] for rows in place.layout.split(everything)])
    counts = [len(rows) // ranks for rows in place.layout.split(everything)]
    where = torch.empty_like(everything).index_copy_(0, in_file_order, torch.arange(len(in_file_order)))
    order = where[own]
    if not torch.equal(own.sort().values, in_file_order.sort().values):
        raise ConfigError(
            f"--lora-rank: {' and '.join(place.hf_names)} have too few heads for {ranks} tensor-parallel ranks with "
            "adapters, which have equal parts of every layer. Give a smaller --tensor-model-parallel-size, leave the "
            "layers out (--exclude-modules), or use --train-backend fsdp"
        )
    return counts, None if torch.equal(order, torch.arange(len(order))) else order.to(module.weight.device)


def _everyones(value: object) -> list:  # type: ignore[type-arg]
    values: list = [None] * dist.get_world_size()  # type: ignore[type-arg]
    dist.all_gather_object(values, value)
    return values

"""A model under its Hugging Face names: streamed to engines, or written as a directory that transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from miles.fsdp.building import Site
from miles.fsdp.loading import decoder_layers

_MAX_SHARD_BYTES = 4 * 2**30
_INDEX = "model.safetensors.index.json"
# What belongs to a checkpoint besides weights: tokenizer, chat template, processors, remote code.
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
_OURS = {"config.json", "generation_config.json", _INDEX}


def named_weights(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Full tensors in ``dtype`` under the names of the checkpoint format, layer by layer.

    transformers keeps some weights fused in memory (the experts of a layer); they are split here.
    Tied weights appear once.  Collective when the model is sharded.
    """
    for block in _blocks(model):
        full = {name: _full(tensor, dtype) for name, tensor in block}
        yield from sorted(revert_weight_conversion(model, full).items())


def save_model(lm: PreTrainedModel, site: Site, source: Path, directory: Path) -> None:
    """Write what transformers loads: weights, configuration, and the tokenizer of ``source``.  Collective."""
    weights = named_weights(lm, site.compute_dtype)
    if site.rank.rank != 0:
        for _ in weights:
            pass
        return
    save_weights(weights, directory)
    save_companions(lm, site.compute_dtype, source, directory)


def save_weights(weights: Iterable[tuple[str, torch.Tensor]], directory: Path) -> None:
    """Write safetensors files of at most 4 GiB (or one tensor), and their index when there are several."""
    shards = list(_written_shards(weights, directory))
    if len(shards) == 1:
        (directory / _temporary_name(0)).rename(directory / "model.safetensors")
        return
    weight_map = {}
    for number, (names, _) in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / _temporary_name(number)).rename(directory / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": sum(size for _, size in shards)}, "weight_map": weight_map}
    (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_companions(model: PreTrainedModel, dtype: torch.dtype, source: Path, directory: Path) -> None:
    """Write the configuration, and copy the tokenizer's files from the checkpoint that training started from."""
    config = model.config.__class__.from_dict(model.config.to_dict())
    config.dtype = dtype
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.save_pretrained(directory)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    if source.resolve() == directory.resolve():
        return
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.name not in _OURS and not path.name.endswith(".index.json"):
                shutil.copyfile(path, directory / path.name)


def _blocks(model: PreTrainedModel) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Weights grouped by decoder layer: what is fused in memory is fused within a layer."""
    layer_of = {id(p): number for number, layer in enumerate(decoder_layers(model)) for p in layer.parameters()}
    block: list[tuple[str, torch.Tensor]] = []
    current: int | None = None
    for name, tensor in _weights(model):
        number = layer_of.get(id(tensor))
        if block and number != current:
            yield block
            block = []
        current = number
        block.append((name, tensor))
    if block:
        yield block


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter | torch.Tensor]]:
    """Parameters, then the buffers that a state dict holds."""
    yield from model.named_parameters()
    kept = model.state_dict(keep_vars=True).keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def _full(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Parameters in ``dtype``; buffers as they are, since models keep some in fp32 on purpose."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().to(dtype) if isinstance(tensor, nn.Parameter) else full.detach()


def _temporary_name(number: int) -> str:
    return f"shard-{number}.partial"


def _written_shards(weights: Iterable[tuple[str, torch.Tensor]], directory: Path) -> Iterator[tuple[list[str], int]]:
    """Names and bytes of each file."""
    shard: dict[str, torch.Tensor] = {}
    size = number = 0
    for name, tensor in weights:
        if shard and size + tensor.nbytes > _MAX_SHARD_BYTES:
            yield _write(shard, directory / _temporary_name(number)), size
            shard, size, number = {}, 0, number + 1
        shard[name] = tensor.contiguous().cpu()
        size += tensor.nbytes
    yield _write(shard, directory / _temporary_name(number)), size


def _write(shard: dict[str, torch.Tensor], path: Path) -> list[str]:
    save_file(shard, path, metadata={"format": "pt"})
    return list(shard)

"""A directory that transformers loads: weights in safetensors files, and what belongs to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

_MAX_SHARD_BYTES = 4 * 2**30
_INDEX = "model.safetensors.index.json"
# What belongs to a checkpoint besides weights: tokenizer, chat template, processors, remote code.
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
_OURS = {"config.json", "generation_config.json", _INDEX}


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


def copy_companions(source: Path, directory: Path) -> None:
    """Copy tokenizer, templates and code of the checkpoint that training started from; not its configuration."""
    if source.resolve() == directory.resolve():
        return
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.name not in _OURS and not path.name.endswith(".index.json"):
                shutil.copyfile(path, directory / path.name)


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

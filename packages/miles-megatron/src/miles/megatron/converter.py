"""Conversion of whole checkpoints, tensor by tensor, each with a self-check."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from miles.core.config import Config
from miles.core.errors import CheckpointError
from miles.core.protocols.backend import Rank
from miles.core.weights.hf_directory import copy_companions
from miles.megatron import checkpoint
from miles.megatron.building import Blueprint
from miles.megatron.constants import read_hf_config, write_hf_config
from miles.megatron.hf_files import HfTensors
from miles.megatron.site import Site
from miles.megatron.stored_model import HfValues, Outline, TorchDistValues
from miles.megatron.streamed_files import write_safetensors, write_torch_dist


@torch.no_grad()  # type: ignore[untyped-decorator]
def to_torch_dist(source: Path, target: Path, *, check: bool = True) -> int:
    """Write the weights of the Hugging Face directory ``source`` as a release; the number of its tensors."""
    with outline_of(source) as outline:
        release = _made(checkpoint.release_directory(target))
        write_torch_dist(release, outline, HfValues(source))
        checkpoint.mark_release(target)
        return _compared(outline, release, source) if check else len(outline.hf_outline())


@torch.no_grad()  # type: ignore[untyped-decorator]
def to_hf(configuration: Path, source: Path, target: Path, *, check: bool = True) -> int:
    """Write the weights of the ``torch_dist`` checkpoint ``source`` as a directory that transformers loads.

    Architecture and tokenizer are those of the Hugging Face directory ``configuration``.
    """
    with outline_of(configuration) as outline:
        resolved = checkpoint.resolve(source)
        checkpoint.require_model(resolved)
        values = TorchDistValues(resolved / checkpoint.WEIGHTS)
        write_safetensors(_made(target), outline.hf_outline(), values.named(outline))
        write_hf_config(configuration, target, outline.dtype)
        copy_companions(configuration, target)
        return _compared(outline, resolved, target) if check else len(outline.hf_outline())


@contextmanager
def outline_of(source: Path) -> Iterator[Outline]:
    """A model of the architecture of ``source``, without weights."""
    hf = read_hf_config(source)
    stored = str(hf.get("dtype", hf.get("torch_dtype"))).removeprefix("torch.")
    half = stored == "bfloat16" or bool(hf.get("quantization_config"))
    config = Config.of(
        train_backend="megatron", hf_checkpoint=str(source), device="cpu", train_dtype="bf16" if half else "fp32"
    )
    site = Site.join(config, Rank())
    gc.freeze()  # to look for garbage among all that was imported takes as long as to copy hundreds of megabytes
    try:
        yield Outline(Blueprint.of(config, site, source), site.dtype)
    finally:
        gc.unfreeze()
        site.leave()


def _compared(outline: Outline, torch_dist: Path, directory: Path) -> int:
    """Tensors of the model, all equal to those of ``directory``.  Raises CheckpointError when they are not."""
    stored = HfTensors(directory)
    count = 0
    for name, tensor in TorchDistValues(torch_dist / checkpoint.WEIGHTS).named(outline):
        if not _same(tensor, stored.get(name).to(tensor.dtype)):
            raise CheckpointError(f"{name} differs from {directory} after the conversion: the result is not valid")
        count += 1
    return count


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether they are equal bit for bit.  Eight bytes at a time are compared several times faster than one value."""
    if one.shape != other.shape:
        return False
    word = torch.int64 if one.nbytes % 8 == 0 else torch.uint8
    same: bool = torch.equal(one.contiguous().view(-1).view(word), other.contiguous().view(-1).view(word))
    return same


def _made(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True)
    except FileExistsError as error:
        raise CheckpointError(f"{directory} exists already; give --save a directory that does not") from error
    return directory

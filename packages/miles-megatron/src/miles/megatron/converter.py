"""Conversion of whole checkpoints through a model of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from miles.core.config import Config
from miles.core.errors import CheckpointError
from miles.core.protocols.backend import Rank
from miles.core.weights.hf_directory import copy_companions, save_weights
from miles.megatron import checkpoint
from miles.megatron.building import Blueprint
from miles.megatron.constants import read_hf_config, write_hf_config
from miles.megatron.conversion import WeightGatherer
from miles.megatron.hf_files import HfTensors
from miles.megatron.language_model import LanguageModel
from miles.megatron.site import Site


def to_torch_dist(source: Path, target: Path) -> int:
    """Write the weights of the Hugging Face directory ``source`` as a release; the number of its tensors."""
    with _model(source) as (blueprint, chunks, dtype):
        blueprint.load(chunks, source)
        checkpoint.write(_made(checkpoint.release_directory(target)), chunks, None)
        checkpoint.mark_release(target)
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.zero_()
        checkpoint.read(checkpoint.resolve(target), chunks, None)
        return _compared(blueprint, chunks, dtype, source)


def to_hf(configuration: Path, source: Path, target: Path) -> int:
    """Write the weights of the ``torch_dist`` checkpoint ``source`` as a directory that transformers loads.

    Architecture and tokenizer are those of the Hugging Face directory ``configuration``.
    """
    with _model(configuration) as (blueprint, chunks, dtype):
        checkpoint.read(checkpoint.resolve(source), chunks, None)
        save_weights(WeightGatherer(chunks, blueprint.weights).named_weights(dtype), _made(target))
        write_hf_config(configuration, target, dtype)
        copy_companions(configuration, target)
        return _compared(blueprint, chunks, dtype, target)


@contextmanager
def _model(source: Path) -> Iterator[tuple[Blueprint, list[LanguageModel], torch.dtype]]:
    """A model of the architecture of ``source`` in this process, without weights, and their dtype."""
    hf = read_hf_config(source)
    half = str(hf.get("dtype", hf.get("torch_dtype"))).removeprefix("torch.") == "bfloat16"
    config = Config.of(
        train_backend="megatron", hf_checkpoint=str(source), device="cpu", train_dtype="bf16" if half else "fp32"
    )
    site = Site.join(config, Rank())
    try:
        blueprint = Blueprint.of(config, site, source)
        yield blueprint, blueprint.build(), site.dtype
    finally:
        site.leave()


def _compared(blueprint: Blueprint, chunks: list[LanguageModel], dtype: torch.dtype, directory: Path) -> int:
    """Tensors of the model, all equal to those of ``directory``.  Raises CheckpointError when they are not."""
    stored = HfTensors(directory)
    count = 0
    for name, tensor in WeightGatherer(chunks, blueprint.weights).named_weights(dtype):
        if not torch.equal(tensor, stored.get(name).to(dtype)):
            raise CheckpointError(f"{name} differs from {directory} after the conversion: the result is not valid")
        count += 1
    return count


def _made(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True)
    except FileExistsError as error:
        raise CheckpointError(f"{directory} exists already; give --save a directory that does not") from error
    return directory

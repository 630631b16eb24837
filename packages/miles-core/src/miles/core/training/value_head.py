"""The critic's value head on disk: a file beside a model in Hugging Face format, the same for every backend.

D = hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from miles.core.driver.weights_only import has_weights_only
from miles.core.errors import CheckpointError
from miles.core.flags.checkpoint import Checkpoint

VALUE_HEAD_FILE = "value_head.safetensors"
_INITIAL_STD = 0.02


def read_value_head(directory: Path, hidden_size: int, seed: int) -> dict[str, torch.Tensor]:
    """``weight`` [1, D] and ``bias`` [1] in fp32 of the head beside the model in ``directory``, or a new head, which
    ``seed`` determines."""
    file = directory / VALUE_HEAD_FILE
    if not file.is_file():
        return new_value_head(hidden_size, seed)
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {"weight": [1, hidden_size], "bias": [1]}:
        raise CheckpointError(f"{file}: expected weight [1, {hidden_size}] and bias [1], found {shapes}")
    return tensors


def new_value_head(hidden_size: int, seed: int) -> dict[str, torch.Tensor]:
    """``weight`` [1, D] and ``bias`` [1] in fp32, which ``seed`` determines."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(1, hidden_size).normal_(0.0, _INITIAL_STD, generator=generator)
    return {"weight": weight, "bias": torch.zeros(1)}


def write_value_head(tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Write ``weight`` and ``bias`` beside the model in ``directory``."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, directory / VALUE_HEAD_FILE, metadata={"format": "pt"})


def critic_source(flags: Checkpoint) -> Path | None:
    """``--critic-load`` where it has weights only; states of runs are loaded later."""
    load = flags.critic_load
    return Path(load) if load is not None and has_weights_only(Path(load)) else None

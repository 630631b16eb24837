"""Low-rank adapters (LoRA, arXiv:2106.09685) on disk, in the format of the PEFT library: the same for every backend.

r = rank, I = inputs, O = outputs of a linear layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from miles.core.errors import CheckpointError, ConfigError
from miles.core.flags.lora import Lora
from miles.core.weights.adapter_form import PARTS, AdapterForm

ALL_LINEAR = "all-linear"
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """Which layers get adapters of which size."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    excluded: tuple[str, ...]
    path: Path | None
    """Adapter to start from."""
    seed: int

    @classmethod
    def of(cls, flags: Lora, seed: int) -> LoraSpec | None:
        """None when the whole model is trained."""
        if not flags.lora_rank:
            return None
        path = Path(flags.lora_adapter_path) if flags.lora_adapter_path else None
        targets, excluded = tuple(flags.target_modules), tuple(flags.exclude_modules)
        return cls(flags.lora_rank, flags.lora_alpha, targets, excluded, path, seed)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def form(self, layers: Iterable[str]) -> AdapterForm:
        """Of the adapter that ``layers`` have."""
        return AdapterForm(self.rank, self.alpha, tuple(layers))

    def chooses(self, name: str) -> bool:
        """Whether the linear layer ``name`` gets an adapter: by its whole name, its end or its last part."""
        everything = self.targets == (ALL_LINEAR,)
        return (everything or _named(name, self.targets)) and not _named(name, self.excluded)

    def nothing_chosen(self, model: str, layers: Collection[str]) -> ConfigError:
        """None of the ``layers`` of ``model`` is meant by the flags."""
        parts = sorted({name.rpartition(".")[2] for name in layers})
        left_out = f" without --exclude-modules {' '.join(self.excluded)}" if self.excluded else ""
        return ConfigError(
            f"--target-modules {' '.join(self.targets)}{left_out} names no linear layer of {model}. It has "
            f"{', '.join(parts)}; {ALL_LINEAR} takes all of them"
        )


def initial_a(rank: int, inputs: int, generator: torch.Generator) -> torch.Tensor:
    """[r, I] as PEFT initializes it.  B is zero, so that training begins with the model as it is."""
    bound = 1.0 / math.sqrt(inputs)
    return torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)


def save_adapter(adapters: Mapping[str, torch.Tensor], spec: LoraSpec, base: Path, directory: Path) -> None:
    """Write whole ``adapters``, by the names of their parameters, as PEFT does."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"{_PREFIX}{name}.weight": tensor.cpu().contiguous() for name, tensor in adapters.items()}
    save_file(tensors, directory / _WEIGHTS, metadata={"format": "pt"})
    layers = sorted({name.rpartition(".")[0] for name in adapters})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": layers if spec.excluded else sorted({name.rpartition(".")[2] for name in layers}),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    (directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_adapter(layers: Collection[str], spec: LoraSpec, path: Path) -> dict[str, torch.Tensor]:
    """The adapter at ``path``, by the names of its parameters (``LAYER.lora_A``).

    Raises ConfigError when it is not one of ``spec`` for these ``layers``.
    """
    config = _read_config(path)
    if (config.get("r"), config.get("lora_alpha")) != (spec.rank, spec.alpha):
        raise ConfigError(
            f"--lora-adapter-path {path} has rank {config.get('r')} and alpha {config.get('lora_alpha')}, but "
            f"--lora-rank is {spec.rank} and --lora-alpha {spec.alpha:g}. Give those of the adapter"
        )
    tensors = load_file(path / _WEIGHTS)
    expected = {f"{_PREFIX}{name}.{part}.weight" for name in layers for part in PARTS}
    if tensors.keys() != expected:
        different = sorted(tensors.keys() ^ expected)
        raise ConfigError(
            f"--lora-adapter-path {path} adapts other layers than --target-modules {' '.join(spec.targets)} names: of "
            f"their tensors, {len(different)} are in one of the two only, such as {different[0]}"
        )
    return {name.removeprefix(_PREFIX).removesuffix(".weight"): tensor for name, tensor in tensors.items()}


def _named(name: str, patterns: Sequence[str]) -> bool:
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--lora-adapter-path: {path / _CONFIG} cannot be read: {error}") from error
    unsupported = [name for name in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern") if config.get(name)]
    if config.get("peft_type") != "LORA" or unsupported:
        raise CheckpointError(
            f"{path / _CONFIG}: expected a plain LoRA adapter, found {config.get('peft_type')} with "
            f"{', '.join(unsupported) or 'nothing else'}"
        )
    return config

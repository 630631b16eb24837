"""Low-rank adapters (LoRA, arXiv:2106.09685): linear layers ``W x + (alpha / r) B A x`` whose ``W`` is frozen.

Adapters are written and read in the format of the PEFT library.  There is no dropout on them: a policy's
log-probabilities are a function of its weights.

r = rank, I = inputs, O = outputs of a layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from miles.core.errors import CheckpointError, ConfigError
from miles.fsdp.flags import Lora
from miles.fsdp.loading import decoder_layers

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


class LoraLinear(nn.Linear):  # type: ignore[misc]
    """A linear layer that has been given an adapter."""

    lora_A: nn.Parameter
    """[r, I]."""
    lora_B: nn.Parameter
    """[O, r]."""
    scale: float
    active: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        if self.active:
            out = out + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale
        return out


def add_adapters(model: PreTrainedModel, spec: LoraSpec) -> None:
    """Freeze ``model`` and give its layers adapters: a model without storage gets such adapters, too."""
    model.requires_grad_(False)
    layers = _chosen(model, spec)
    generator = torch.Generator().manual_seed(spec.seed)
    for layer in layers.values():
        _adapt(layer, spec, generator)
    if spec.path is not None and model.device.type != "meta":
        _read(layers, spec, spec.path)


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers with adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return name.endswith((".lora_A", ".lora_B"))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model that training started from."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


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


def _chosen(model: PreTrainedModel, spec: LoraSpec) -> dict[str, nn.Linear]:
    """Linear layers of the decoder that the flags name, by their whole name, its end or its last part."""
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside
    }
    everything = spec.targets == (ALL_LINEAR,)
    chosen = {
        name: module
        for name, module in linear.items()
        if (everything or _named(name, spec.targets)) and not _named(name, spec.excluded)
    }
    if not chosen:
        parts = sorted({name.rpartition(".")[2] for name in linear})
        raise ConfigError(
            f"--target-modules {' '.join(spec.targets)} (without --exclude-modules {' '.join(spec.excluded)}) names no "
            f"linear layer of {type(model).__name__}. It has {', '.join(parts)}; {ALL_LINEAR} takes all of them"
        )
    return chosen


def _named(name: str, patterns: Sequence[str]) -> bool:
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _adapt(layer: nn.Linear, spec: LoraSpec, generator: torch.Generator) -> None:
    """As PEFT initializes: A uniform, B zero, so that training begins with the model as it is."""
    outputs, inputs = layer.weight.shape
    layer.__class__ = LoraLinear
    device = layer.weight.device
    a = torch.empty(spec.rank, inputs, device=device)
    if device.type != "meta":
        a.uniform_(-1.0 / math.sqrt(inputs), 1.0 / math.sqrt(inputs), generator=generator)
    layer.lora_A = nn.Parameter(a)
    layer.lora_B = nn.Parameter(torch.zeros(outputs, spec.rank, device=device))
    layer.scale, layer.active = spec.scale, True


@torch.no_grad()  # type: ignore[untyped-decorator]
def _read(layers: Mapping[str, nn.Module], spec: LoraSpec, path: Path) -> None:
    config = _read_config(path)
    if (config.get("r"), config.get("lora_alpha")) != (spec.rank, spec.alpha):
        raise ConfigError(
            f"--lora-adapter-path {path} has rank {config.get('r')} and alpha {config.get('lora_alpha')}, but "
            f"--lora-rank is {spec.rank} and --lora-alpha {spec.alpha:g}. Give those of the adapter"
        )
    tensors = load_file(path / _WEIGHTS)
    expected = {f"{_PREFIX}{name}.{part}.weight" for name in layers for part in ("lora_A", "lora_B")}
    if tensors.keys() != expected:
        different = sorted(tensors.keys() ^ expected)
        raise ConfigError(
            f"--lora-adapter-path {path} adapts other layers than --target-modules {' '.join(spec.targets)} names: "
            f"{different[0]} and {len(different) - 1} more are in one of the two only"
        )
    for name, layer in layers.items():
        for part in ("lora_A", "lora_B"):
            getattr(layer, part).copy_(tensors[f"{_PREFIX}{name}.{part}.weight"])


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

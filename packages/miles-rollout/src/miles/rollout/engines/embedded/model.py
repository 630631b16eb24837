"""What the scheduler needs of a model, and which model serves a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from miles.core.errors import EngineError
from miles.rollout.engines.embedded.adapters import Place
from miles.rollout.engines.embedded.attention import Plan
from miles.rollout.engines.embedded.kv import KVShape
from miles.rollout.engines.embedded.weights import WeightStore, parse_dtype


class Model(Protocol):
    """A causal language model over slots."""

    kind: str
    """``fast`` or ``general``, for the curious."""
    batch_invariant: bool
    """A row's bits do not depend on the rows beside it."""
    row_multiple: int
    """The number of rows that it computes must be a multiple of this; divides ROW_MULTIPLE."""
    kv_shape: KVShape
    hidden_size: int
    vocab_size: int
    weights: WeightStore
    adapter_places: dict[str, Place]
    """The linear layers that can be given adapters, by their Hugging Face names."""

    def free_copies(self) -> int:
        """Free what is made of the weights again when it is needed; the bytes that it took."""

    def forward(self, plan: Plan) -> torch.Tensor:
        """Hidden states [M, hidden] after the last norm, valid until the next call; keys and values are stored."""

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """Write the logits [N, V] of ``hidden`` [N, hidden]; N is a multiple of ``row_multiple``."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A Hugging Face model directory."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]

    @classmethod
    def open(cls, path: str) -> Checkpoint:
        """Read the configuration files; raise EngineError when the directory is not a model's."""
        directory = Path(path)
        if not (directory / "config.json").exists():
            raise EngineError(f"--model-path {path}: there is no config.json; expected a Hugging Face model directory")
        generation = directory / "generation_config.json"
        return cls(
            directory,
            json.loads((directory / "config.json").read_text()),
            json.loads(generation.read_text()) if generation.exists() else {},
        )

    @property
    def architecture(self) -> str:
        return str((self.config.get("architectures") or ["unknown"])[0])

    @property
    def context_length(self) -> int:
        """Longest sequence the model was made for."""
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            if self.config.get(key):
                return int(self.config[key])
        return 2048

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-text ids of both configuration files."""
        ids: set[int] = set()
        for source in (self.config, self.generation_config):
            value = source.get("eos_token_id")
            ids.update(value if isinstance(value, list) else [] if value is None else [value])
        return tuple(sorted(ids))

    def dtype(self, name: str) -> torch.dtype:
        """``auto``: bfloat16 for a bfloat16 checkpoint, else float32 (float16 is slow and narrow on a CPU)."""
        if name == "auto":
            stored = self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
            return torch.bfloat16 if stored == "bfloat16" else torch.float32
        dtype = parse_dtype(name)
        if dtype not in (torch.float32, torch.bfloat16):
            raise EngineError(f"--dtype {name}: the embedded engine computes in float32 or bfloat16")
        return dtype


def experts_per_token(checkpoint: Checkpoint) -> int:
    """Experts that each token uses in a layer; EngineError when the model has none."""
    config = checkpoint.config
    if not (config.get("num_experts") or config.get("num_local_experts")):
        raise EngineError(
            f"--enable-return-routed-experts: {checkpoint.architecture} has no experts. Leave it out "
            "(in a run: --use-rollout-routing-replay)"
        )
    return int(config["num_experts_per_tok"])


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, kind: str = "auto", *, keep_experts: bool = False) -> Model:
    """The model of a checkpoint.  ``kind`` ``fast`` or ``general`` insists on one of the two layers.

    ``keep_experts``: the experts that tokens use are kept with their keys and values.
    """
    # Either import is wasted when the other layer serves the model, and transformers takes seconds.
    from miles.rollout.engines.embedded.model_fast import FastModel, unsupported

    reason = unsupported(checkpoint.config)
    if kind == "fast" and reason:
        raise EngineError(f"--model-layer fast: {reason}")
    if kind == "fast" or (kind == "auto" and reason is None):
        return FastModel(checkpoint, dtype, keep_experts=keep_experts)
    if keep_experts:
        raise EngineError(f"--enable-return-routed-experts: only the fast layer returns them, and {reason or kind}")
    from miles.rollout.engines.embedded.model_general import GeneralModel

    return GeneralModel(checkpoint, dtype)

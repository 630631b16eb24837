"""Arithmetic of a decoder from its configuration, for ``perf/*_tflops``.

A product of an [m, k] with a [k, n] matrix counts 2 m k n operations, causal attention half of the full square, a
backward pass twice a forward pass; norms, activations and the softmax are left out, as is what is computed twice to
save memory.  (The counting of arXiv:2204.02311, appendix B.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PASSES = {"actor_train": 3, "log_probs": 1, "ref_log_probs": 1, "teacher_log_probs": 1}
"""Forward passes that a phase is worth."""
_OTHERWISE = ("q_lora_rank", "kv_lora_rank", "n_routed_experts", "moe_num_experts", "moe_topk")


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """``per_token``: products with weights; ``per_pair``: attention, for each token and each one that it looks at."""

    per_token: float
    per_pair: float

    @classmethod
    def of_checkpoint(cls, path: str | None) -> ModelFlops | None:
        """None where the configuration does not tell what a decoder with grouped attention consists of."""
        file = Path(path or "") / "config.json"
        if path is None or not file.is_file():
            return None
        config = json.loads(file.read_text(encoding="utf-8"))
        return cls.of_config(config.get("text_config") or config)

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> ModelFlops | None:
        """From a Hugging Face configuration."""
        try:
            hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
            vocab, size = config["vocab_size"], config["intermediate_size"]
        except KeyError:
            return None
        experts = config.get("num_experts") or config.get("num_local_experts")
        # Latent attention has other products, and experts under other names are counted in other ways.
        if any(config.get(name) for name in _OTHERWISE) or (experts and "num_experts_per_tok" not in config):
            return None
        dim = config.get("head_dim") or hidden // heads
        kv_heads = config.get("num_key_value_heads") or heads
        attention = hidden * dim * (2 * heads + 2 * kv_heads)
        per_layer = attention + 3 * hidden * size
        if experts:
            chosen = config["num_experts_per_tok"] * config.get("moe_intermediate_size", size)
            shared = config.get("shared_expert_intermediate_size") or 0
            per_layer = attention + hidden * (experts + 3 * (chosen + shared))
        return cls(per_token=2.0 * (layers * per_layer + hidden * vocab), per_pair=4.0 * layers * heads * dim)

    def forward(self, lengths: Sequence[int]) -> float:
        """Operations of one forward pass over sequences of these lengths."""
        pairs = sum(length * (length + 1) / 2 for length in lengths)
        return self.per_token * sum(lengths) + self.per_pair * pairs

    def rates(self, lengths: Sequence[int], seconds: Mapping[str, float], num_ranks: int) -> dict[str, float]:
        """``perf/PHASE_tflops``: 10^12 operations a second and rank, of the phases that took place."""
        forward = self.forward(lengths) / num_ranks / 1e12
        return {
            f"perf/{phase}_tflops": passes * forward / seconds[phase]
            for phase, passes in _PASSES.items()
            if seconds.get(phase)
        }

"""Qwen3 with mixtures of experts."""

from __future__ import annotations

from typing import Any

from miles.megatron.families.dense import (
    HF_LAYER,
    LAYER,
    attention_rules,
    decoder,
    mlp_rules,
    outer_rules,
)
from miles.megatron.layouts import COLUMNS, GATED
from miles.megatron.model_map import Architecture, HfConfig, ModelMap, Rule, WeightMap


def expert_layers(hf: HfConfig) -> list[int]:
    """1 for every layer with experts, 0 for a dense one."""
    dense, every = set(hf.get("mlp_only_layers") or ()), hf.get("decoder_sparse_step", 1)
    return [int(n not in dense and (n + 1) % every == 0) for n in range(hf["num_hidden_layers"])]


def num_experts(hf: HfConfig) -> int:
    """Routed experts of a layer; transformers has renamed the field."""
    return int(hf.get("num_experts") or hf.get("num_local_experts") or hf["n_routed_experts"])


def expert_constants(hf: HfConfig, pattern: list[int]) -> dict[str, Any]:
    """Fields of ``TransformerConfig`` about experts.

    No auxiliary loss: reinforcement learning trains with the policy's own routing unless flags ask otherwise.
    """
    return {
        "num_moe_experts": num_experts(hf),
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_layer_freq": pattern,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
    }


def expert_rules(prefix: str = "mlp.", hf_prefix: str = "mlp.") -> list[Rule]:
    """The norm before the experts, the router and the experts."""
    ours, theirs = LAYER + prefix, HF_LAYER + hf_prefix
    expert, hf_expert = ours + "experts.local_experts.{expert}.", theirs + "experts.{expert}."
    return [
        Rule(LAYER + "pre_mlp_layernorm.weight", (HF_LAYER + "post_attention_layernorm.weight",)),
        Rule(ours + "router.weight", (theirs + "gate.weight",)),
        Rule(expert + "linear_fc1.weight", (hf_expert + "gate_proj.weight", hf_expert + "up_proj.weight"), GATED),
        Rule(expert + "linear_fc2.weight", (hf_expert + "down_proj.weight",), COLUMNS),
    ]


def _architecture(hf: HfConfig) -> Architecture:
    return decoder(
        hf,
        qk_layernorm=True,
        add_qkv_bias=bool(hf.get("attention_bias")),
        # Softmax over the chosen experts alone is what normalizing the chosen probabilities comes to.
        moe_router_pre_softmax=not hf.get("norm_topk_prob", False),
        **expert_constants(hf, expert_layers(hf)),
    )


def _weights(hf: HfConfig, padded: int) -> WeightMap:
    return WeightMap([*outer_rules(hf, padded), *attention_rules(hf), *mlp_rules(), *expert_rules()])


QWEN3_MOE = ModelMap(_architecture, _weights)

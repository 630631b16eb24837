"""Qwen3 with mixtures of experts."""

from __future__ import annotations

from miles.megatron.families.dense import attention_rules, decoder, mlp_rules, outer_rules
from miles.megatron.families.experts import expert_constants, expert_rules
from miles.megatron.model_map import Architecture, HfConfig, ModelMap, WeightMap


def _expert_layers(hf: HfConfig) -> list[int]:
    """1 for every layer with experts, 0 for a dense one."""
    dense, every = set(hf.get("mlp_only_layers") or ()), hf.get("decoder_sparse_step", 1)
    return [int(n not in dense and (n + 1) % every == 0) for n in range(hf["num_hidden_layers"])]


def _architecture(hf: HfConfig) -> Architecture:
    return decoder(
        hf,
        qk_layernorm=True,
        add_qkv_bias=bool(hf.get("attention_bias")),
        # Softmax over the chosen experts alone is what normalizing the chosen probabilities comes to.
        moe_router_pre_softmax=not hf.get("norm_topk_prob", False),
        **expert_constants(hf, _expert_layers(hf)),
    )


def _weights(hf: HfConfig, padded: int) -> WeightMap:
    return WeightMap([*outer_rules(hf, padded), *attention_rules(hf), *mlp_rules(), *expert_rules()])


QWEN3_MOE = ModelMap(_architecture, _weights)

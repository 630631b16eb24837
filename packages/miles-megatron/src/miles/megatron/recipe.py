"""``MODEL_ARGS`` of launch scripts, made from a model's ``config.json``.

``python -m miles.megatron.recipe CONFIG.json ...`` prints them; with ``--into DIRECTORY`` each becomes a script there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from miles.core.errors import MilesError
from miles.megatron import cpu
from miles.megatron.model_map import LATENT_FIELDS, Architecture

# In the order of a script.
_NAMES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "group_query_attention",
    "num_query_groups",
    "kv_channels",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "qk_layernorm",
    "softmax_type",
    "window_size",
    "window_attn_skip_freq",
    "swiglu",
    "quick_geglu",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "disable_bias_linear",
    "add_qkv_bias",
    "normalization",
    "norm_epsilon",
    "post_self_attn_layernorm",
    "post_mlp_layernorm",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
    "use_rope_scaling",
    "rope_scaling_factor",
    "num_experts",
    "moe_layer_freq",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_router_topk",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_score_function",
    "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias",
    "vocab_size",
    "untie_embeddings_and_output_weights",
)
_OF_EXPERTS = {name for name in _NAMES if name.startswith("moe_")}
# Not worth a line.
_USUAL = {"softmax_type": "vanilla", "glu_linear_offset": 0.0, "rotary_percent": 1.0}


def script(name: str, architecture: Architecture) -> str:
    """A shell script that sets ``MODEL_ARGS``."""
    lines = "".join(f"    {line}\n" for line in model_args(architecture))
    return f"# {name}, from its config.json: python -m miles.megatron.recipe\nMODEL_ARGS=(\n{lines})\n"


def model_args(architecture: Architecture) -> list[str]:
    """One flag with its value each."""
    # Late: the adaptation comes before anything of Megatron-Core.
    from miles.megatron.architecture_flags import describe

    known = describe(architecture)
    known["group_query_attention"] = known.get("num_query_groups", 0) not in (0, known["num_attention_heads"])
    left_out = {name for name, value in _USUAL.items() if known[name] == value}
    if known["num_experts"] is None:
        left_out |= _OF_EXPERTS
    if not architecture.latent_attention:
        left_out |= set(LATENT_FIELDS)
    if not (architecture.latent_attention or architecture.yarn):
        left_out.add("rotary_scaling_factor")
    shown = {name: known[name] for name in _NAMES if name in known and name not in left_out}
    return [_flag(name, value) for name, value in shown.items() if value is not None and value is not False]


def _flag(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    if value is True:
        return flag
    if isinstance(value, tuple):
        return f"{flag} {','.join(map(str, value))}"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{flag} {shlex.quote(_pattern(value)) if isinstance(value, list) else value}"


def _pattern(values: Sequence[int]) -> str:
    """``[1,0]*12`` where the beginning repeats itself, else runs like ``[0]*3+[1]*58``."""
    for period in range(1, len(values) // 2 + 1):
        if list(values) == list(values[:period]) * (len(values) // period):
            return f"[{','.join(map(str, values[:period]))}]*{len(values) // period}"
    return "+".join(f"[{value}]*{len(list(run))}" for value, run in groupby(values))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="miles.megatron.recipe", description=__doc__)
    parser.add_argument("configs", nargs="+", type=Path, help="config.json, or another file like it")
    parser.add_argument("--into", type=Path, help="directory of scripts, each named as its configuration")
    options = parser.parse_args(arguments)
    cpu.install()
    from miles.megatron.constants import model_map

    for path in options.configs:
        name = path.parent.name if path.name == "config.json" else path.stem
        try:
            hf = json.loads(path.read_text(encoding="utf-8"))
            text = script(name, model_map(hf).architecture(hf))
        except (MilesError, OSError, ValueError, KeyError) as error:
            sys.stderr.write(f"error: {path}: {error}\n")
            return 1
        if options.into is None:
            sys.stdout.write(text)
        else:
            (options.into / f"{name}.sh").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Megatron's own arguments about a model, as launch scripts have them in ``MODEL_ARGS``.  Imports nothing heavy.

Those that are fields of its ``TransformerConfig`` under the same name are flags already; here are the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from miles.core.config.group import Group

_TERM = re.compile(r"\[(\d+(?:,\d+)*)\](?:\*(\d+))?")


class ModelArgs(Group):
    title = "Megatron Model Arguments"

    vocab_size: PositiveInt | None = None
    """Tokens of the vocabulary."""

    max_position_embeddings: PositiveInt | None = None
    """Positions that the model was made for."""

    swiglu: bool | None = None
    """The MLP has a gate with SiLU."""

    quick_geglu: bool | None = None
    """The MLP has a gate with the quick approximation of GELU."""

    disable_bias_linear: bool | None = None
    """Linear layers have no biases; ``--add-qkv-bias`` alone gives some to queries, keys and values."""

    norm_epsilon: PositiveFloat | None = None
    """What norms add to the variance (``--layernorm-epsilon``)."""

    group_query_attention: bool | None = None
    """Query heads share keys and values, in ``--num-query-groups`` groups."""

    untie_embeddings_and_output_weights: bool | None = None
    """The output head has weights of its own."""

    position_embedding_type: Literal["rope", "yarn"] | None = None
    """How positions are known: rotary, or rotary as YaRN stretches it."""

    use_rotary_position_embeddings: bool | None = None
    """Positions are rotary, as they are in every model here."""

    use_rope_scaling: bool | None = None
    """Rotary positions are stretched as Llama 3's."""

    rope_scaling_factor: PositiveFloat | None = None
    """How far they are."""

    no_rope_fusion: bool | None = None
    """Do without the fused kernel of rotary positions."""

    post_self_attn_layernorm: bool | None = None
    """The attention's output is normed before it is added."""

    post_mlp_layernorm: bool | None = None
    """The MLP's output is normed before it is added."""

    num_experts: PositiveInt | None = None
    """Routed experts of a layer (``--num-moe-experts``)."""

    moe_layer_freq: str | None = None
    """Which layers have experts: every Nth, or ones and zeros like ``[0]*3+[1]*58``."""

    window_size: str | None = None
    """Tokens that a sliding window sees before and after its own, like ``127,0``."""

    window_attn_skip_freq: str | None = None
    """Which layers have a sliding window: all but every Nth, or ones and zeros."""

    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Compute linear layers in FP8 of this format (``--fp8``). Needs Transformer Engine and a GPU."""

    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] | None = None
    """Which kernels of attention Transformer Engine may use."""

    decoder_first_pipeline_num_layers: NonNegativeInt | None = None
    """Layers of the first stage (``--num-layers-in-first-pipeline-stage``)."""

    decoder_last_pipeline_num_layers: NonNegativeInt | None = None
    """Layers of the last stage (``--num-layers-in-last-pipeline-stage``)."""

    def unreadable(self) -> Iterator[str]:
        """What is wrong with values that have a form of their own."""
        for flag, text, read in (
            ("--moe-layer-freq", self.moe_layer_freq, layer_pattern),
            ("--window-attn-skip-freq", self.window_attn_skip_freq, layer_pattern),
            ("--window-size", self.window_size, window),
        ):
            try:
                if text is not None:
                    read(text)
            except ValueError as error:
                yield f"{flag}: {error}"

    def transformer_fields(self) -> dict[str, Any]:
        """Fields of ``TransformerConfig`` that the given flags set under other names or in other forms."""
        values = {
            "layernorm_epsilon": self.norm_epsilon,
            "add_bias_linear": None if self.disable_bias_linear is None else not self.disable_bias_linear,
            "num_moe_experts": self.num_experts,
            "moe_layer_freq": None if self.moe_layer_freq is None else layer_pattern(self.moe_layer_freq),
            "window_size": None if self.window_size is None else window(self.window_size),
            "window_attn_skip_freq": None
            if self.window_attn_skip_freq is None
            else layer_pattern(self.window_attn_skip_freq),
            "fp8": self.fp8_format,
            "apply_rope_fusion": False if self.no_rope_fusion else None,
            "num_layers_in_first_pipeline_stage": self.decoder_first_pipeline_num_layers,
            "num_layers_in_last_pipeline_stage": self.decoder_last_pipeline_num_layers,
        }
        return {name: value for name, value in values.items() if value is not None}


def layer_pattern(text: str) -> int | list[int]:
    """``3``, ``[1,0,1]``, ``[0]*3+[1]*58``, also within the quotes and parentheses of scripts.

    Raises ValueError for anything else.
    """
    bare = re.sub(r"[\s'\"()]", "", text)
    if bare.isdecimal():
        return int(bare)
    pattern = []
    for term in bare.split("+"):
        match = _TERM.fullmatch(term)
        if match is None:
            raise ValueError(f"{text!r} is no pattern of layers; expected a number, or lists like [0]*3+[1]*58")
        pattern += [int(number) for number in match[1].split(",")] * int(match[2] or 1)
    return pattern


def window(text: str) -> tuple[int, int]:
    """``127,0`` or ``(127, 0)``.  Raises ValueError for anything else."""
    match = re.fullmatch(r"\(?(-?\d+),(-?\d+)\)?", re.sub(r"[\s'\"]", "", text))
    if match is None:
        raise ValueError(f"{text!r} is no window; expected two numbers like 127,0")
    return int(match[1]), int(match[2])

"""Which modules the layers of a model are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from miles.megatron.model_map import Architecture


def decoder_spec(config: TransformerConfig, architecture: Architecture, part: int | None) -> TransformerBlockSubmodules:
    """The layers of this rank's virtual stage ``part``, in the layout of Transformer Engine."""
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(config, True, vp_stage=part)
    if architecture.sandwich_norms:
        spec.layer_specs = [replace(layer, module=SandwichLayer) for layer in spec.layer_specs]
    return spec


def mtp_spec(
    config: TransformerConfig, decoder: TransformerBlockSubmodules, part: int | None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The layers of multi-token prediction, like the last of the ``decoder``; None where this stage has none."""
    if config.mtp_num_layers is None:
        return None
    spec = gpt_layer_specs.get_gpt_mtp_block_spec(config, decoder, True, vp_stage=part)
    if spec is not None:
        spec.layer_specs = [replace(layer, module=PackedMtpLayer) for layer in spec.layer_specs]
    return spec


class PackedMtpLayer(MultiTokenPredictionLayer):  # type: ignore[misc]
    """Multi-token prediction whose recomputation takes packed samples too."""

    def _checkpointed_forward(self, forward: Callable[..., torch.Tensor], **inputs: Any) -> torch.Tensor:
        if self.config.fp8:
            recomputed: torch.Tensor = super()._checkpointed_forward(forward, **inputs)
        else:
            tensors = [inputs.pop(name) for name in ("hidden_states", "decoder_input")]

            def computed(hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
                return forward(hidden_states=hidden, decoder_input=embedded, **inputs)

            recomputed = checkpoint(computed, self.config.distribute_saved_activations, *tensors)
        return recomputed


class SandwichLayer(TransformerLayer):  # type: ignore[misc]
    """A layer that also norms what attention and MLP give, before it is added to the residual stream."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for part, place in (("self_attn", "post_self_attn_layernorm"), ("mlp", "post_mlp_layernorm")):
            norm = gpt_layer_specs.TENorm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
            setattr(self, place, norm)
            setattr(self, f"{part}_bda", _normed_before(norm, getattr(self, f"{part}_bda")))


Addition = Callable[..., Callable[[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor]]
"""Megatron-Core's ``get_bias_dropout_add``."""


def _normed_before(norm: nn.Module, addition: Addition) -> Addition:
    """``addition`` of a normed output."""

    def made(*args: Any) -> Callable[..., torch.Tensor]:
        add = addition(*args)

        def add_normed(
            output: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
        ) -> torch.Tensor:
            x, bias = output
            return add((norm(x if bias is None else x + bias), None), residual, dropout)

        return add_normed

    return made

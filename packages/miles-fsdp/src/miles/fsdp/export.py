"""A model under its Hugging Face names: streamed to engines, or written as a directory that transformers loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from miles.core.weights.adapter_form import PARTS, AdapterForm, tensor_name
from miles.core.weights.adapters import LoraSpec, save_adapter
from miles.core.weights.hf_directory import copy_companions, save_weights
from miles.fsdp.building import Site
from miles.fsdp.loading import decoder_layers
from miles.fsdp.lora import LoraLinear, adapted_layers, is_adapter
from miles.fsdp.policy import whole


def named_weights(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Full tensors in ``dtype`` under the names of the checkpoint format, layer by layer.

    transformers keeps some weights fused in memory (the experts of a layer); they are split here.
    Tied weights appear once, adapters are added to their weights.  Collective when the model is sharded.
    """
    adapted = {f"{name}.weight": layer for name, layer in adapted_layers(model).items()}
    for block in _blocks(model):
        full = {name: _full(tensor, dtype, adapted.get(name)) for name, tensor in block}
        yield from sorted(revert_weight_conversion(model, full).items())


def adapter_form(model: PreTrainedModel, spec: LoraSpec) -> AdapterForm:
    """Of the adapters that ``model`` was given."""
    return spec.form(adapted_layers(model))


def named_adapters(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Full tensors of the adapters in ``dtype``, as ``adapter_form`` names them.  Collective when sharded."""
    for name, layer in adapted_layers(model).items():
        for part in PARTS:
            yield tensor_name(name, part), whole(getattr(layer, part)).detach().to(dtype)


def save_model(lm: PreTrainedModel, site: Site, source: Path, directory: Path) -> None:
    """Write what transformers loads: weights, configuration, and the tokenizer of ``source``.  Collective."""
    weights = named_weights(lm, site.compute_dtype)
    if site.rank.rank != 0:
        for _ in weights:
            pass
        return
    save_weights(weights, directory)
    save_companions(lm, site.compute_dtype, source, directory)


def save_adapters(lm: PreTrainedModel, spec: LoraSpec, site: Site, source: Path, directory: Path) -> None:
    """Write the adapters alone, in PEFT's format.  Collective."""
    adapters = {name: whole(p.detach()) for name, p in lm.named_parameters() if is_adapter(name)}
    if site.rank.rank == 0:
        save_adapter(adapters, spec, source, directory)


def save_companions(model: PreTrainedModel, dtype: torch.dtype, source: Path, directory: Path) -> None:
    """Write the configuration, and copy the tokenizer's files from the checkpoint that training started from."""
    config = model.config.__class__.from_dict(model.config.to_dict())
    config.dtype = dtype
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.save_pretrained(directory)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    copy_companions(source, directory)


def _blocks(model: PreTrainedModel) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Weights grouped by decoder layer: what is fused in memory is fused within a layer."""
    layer_of = {id(p): number for number, layer in enumerate(decoder_layers(model)) for p in layer.parameters()}
    block: list[tuple[str, torch.Tensor]] = []
    current: int | None = None
    for name, tensor in _weights(model):
        number = layer_of.get(id(tensor))
        if block and number != current:
            yield block
            block = []
        current = number
        block.append((name, tensor))
    if block:
        yield block


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter | torch.Tensor]]:
    """Parameters, then the buffers that a state dict holds."""
    yield from ((name, parameter) for name, parameter in model.named_parameters() if not is_adapter(name))
    kept = model.state_dict(keep_vars=True).keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def _full(tensor: torch.Tensor, dtype: torch.dtype, layer: LoraLinear | None) -> torch.Tensor:
    """Parameters in ``dtype``; buffers as they are, since models keep some in fp32 on purpose."""
    full = whole(tensor).detach()
    if layer is not None:
        full = full.addmm(whole(layer.lora_B).detach(), whole(layer.lora_A).detach(), alpha=layer.scale)
    return full.to(dtype) if isinstance(tensor, nn.Parameter) else full

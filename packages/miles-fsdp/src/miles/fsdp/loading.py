"""Hugging Face checkpoints to models, ready to be packed and sharded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from miles.core.errors import TrainingError
from miles.fsdp.fused_norm import fuse_norms


def load_model(path: str, attention: str, *, needs_head: bool = True) -> PreTrainedModel:
    """The model at ``path`` with its weights, in fp32 on the CPU: these are the master weights."""
    with _no_progress_bar():
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
        )
    model = _prepared(model, path)
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    missing = [name for name in report["missing_keys"] if needs_head or id(model.get_parameter(name)) not in head]
    if missing:
        raise TrainingError(f"{path} lacks the weights {sorted(missing)} of a {type(model).__name__}")
    return model


def empty_model(path: str, attention: str) -> PreTrainedModel:
    """The same model without storage, for ranks that receive their weights from rank 0."""
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    return _prepared(model, path)


def decoder_layers(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The blocks that are sharded, and recomputed, one by one."""
    names = set(model._no_split_modules or ())
    return (module for module in model.modules() if type(module).__name__.removeprefix("FSDP") in names)


def recompute_layers(model: PreTrainedModel) -> None:
    """Keep only the inputs of the blocks for the backward pass."""
    with warnings.catch_warnings():
        # The method has a new name in recent versions, and only the old one in others.
        warnings.filterwarnings("ignore", category=FutureWarning, message="`gradient_checkpointing_enable`")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """A run has a console of its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    yield
    if shown:
        logging.enable_progress_bar()


def _prepared(model: PreTrainedModel, path: str) -> PreTrainedModel:
    if model.get_output_embeddings() is None or model.base_model is model:
        raise TrainingError(
            f"{path}: {type(model).__name__} is not a body with an output head, which the fsdp backend needs to "
            "compute log-probabilities without logits"
        )
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fuse_norms(model)
    return model

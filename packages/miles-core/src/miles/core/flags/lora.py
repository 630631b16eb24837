"""Adapters that are trained instead of the whole model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat

from miles.core.config.group import Group


class Lora(Group):
    title = "LoRA Arguments"

    lora_rank: NonNegativeInt = 0
    """Train adapters of this rank instead of the whole model; 0: the whole model. Checkpoints hold the adapters alone,
    and ``--save-hf`` writes both the model with the adapters added and the adapter (PEFT format, in ``adapter/``)."""

    lora_alpha: PositiveFloat = 16.0
    """Adapters are scaled by ``lora_alpha / lora_rank``."""

    target_modules: list[str] = Field(default_factory=lambda: ["all-linear"])
    """Linear layers that get an adapter, by the last part of their name (``q_proj``) or more of it. ``all-linear``: all
    of the decoder."""

    exclude_modules: list[str] = Field(default_factory=list)
    """Layers that get none although ``--target-modules`` names them."""

    lora_adapter_path: str | None = None
    """Adapter in PEFT format to start from. The reference model starts without it."""

    lora_serving: Literal["auto", "adapter", "merged"] = "auto"
    """How engines get what is trained. ``adapter``: they hold the model of ``--hf-checkpoint`` and add the adapter
    while they compute, so that an update is the adapter alone. ``merged``: they get whole weights with the adapter
    added. ``auto``: ``adapter`` where all engines can, else ``merged``."""

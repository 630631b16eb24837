"""Flags of the Megatron backend.  Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import NonNegativeFloat, PositiveInt

from miles.core.config.group import Flag, Group

_NO_BACKEND = "the megatron backend does not exist yet"


class Megatron(Group):
    title = "Megatron Specific Arguments"

    megatron_to_hf_mode: Annotated[Literal["raw", "bridge"], Flag(unsupported=_NO_BACKEND)] = "raw"
    """How weights get Hugging Face names: by Miles' own tables (``raw``) or by Megatron-Bridge (``bridge``)."""


class Mtp(Group):
    title = "Multi-Token Prediction (MTP) Arguments"

    enable_mtp_training: Annotated[bool, Flag(unsupported=_NO_BACKEND)] = False
    """Train the multi-token-prediction layers."""

    mtp_num_layers: Annotated[PositiveInt | None, Flag(unsupported=_NO_BACKEND)] = None
    """Number of multi-token-prediction layers."""

    mtp_loss_scaling_factor: Annotated[NonNegativeFloat, Flag(unsupported=_NO_BACKEND)] = 0.2
    """Weight of the multi-token-prediction loss."""


GROUPS: tuple[type[Group], ...] = (Megatron, Mtp)

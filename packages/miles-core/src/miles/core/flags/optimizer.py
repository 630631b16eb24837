"""Optimizer and learning-rate schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from miles.core.config.group import DERIVED, Group

Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
AnnealStyle = Literal["linear", "cosine", "exponential", "minus_sqrt"]


class Optimizer(Group):
    title = "Optimizer"

    optimizer: Literal["adam", "sgd"] = "adam"
    """Optimizer; ``adam`` is AdamW with decoupled weight decay."""

    lr: NonNegativeFloat = 1e-6
    """Peak learning rate of the actor."""

    lr_warmup_init: NonNegativeFloat = 0.0
    """Learning rate at the first step of the warm-up."""

    min_lr: NonNegativeFloat = 0.0
    """Learning rate after the decay."""

    lr_decay_style: DecayStyle = DERIVED
    """Shape of the decay. Defaults to the backend's: ``constant`` (fsdp), ``linear`` (megatron)."""

    lr_warmup_iters: NonNegativeInt = 0
    """Optimizer steps of warm-up."""

    lr_decay_iters: PositiveInt | None = None
    """Optimizer steps until the decay ends, warm-up included. Defaults to the steps of the whole run."""

    lr_warmup_fraction: Fraction | None = None
    """Warm-up as a share of ``--lr-decay-iters``, instead of ``--lr-warmup-iters``."""

    adam_beta1: Beta = 0.9
    """Decay of Adam's first moment."""

    adam_beta2: Beta = 0.95
    """Decay of Adam's second moment."""

    adam_eps: PositiveFloat = 1e-8
    """Added to the root of Adam's second moment."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""

    clip_grad: NonNegativeFloat = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""

    lr_wsd_decay_iters: PositiveInt | None = None
    """Last optimizer steps over which a ``WSD`` schedule anneals."""

    lr_wsd_decay_style: AnnealStyle | None = None
    """Shape of the annealing of a ``WSD`` schedule. Defaults to ``exponential``."""

    warmup_ratio: Fraction = 0.03
    """Another name of ``--lr-warmup-fraction``: warm-up as a share of the schedule. It has an effect when it is given,
    be it at its default."""

    use_checkpoint_lr_scheduler: bool = False
    """When a run is resumed, take the settings of the learning-rate schedule from the checkpoint instead of the command
    line. The count of steps comes from the checkpoint in any case."""

    override_lr_scheduler: bool = False
    """When a run is resumed, take the settings of the learning-rate schedule from the command line, and say nothing
    when they differ from those in the checkpoint. Without this flag and ``--use-checkpoint-lr-scheduler`` the command
    line counts as well, with a warning that the schedule has changed."""

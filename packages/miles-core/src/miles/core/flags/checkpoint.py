"""The model to start from, and where runs are saved and resumed."""

from __future__ import annotations

from typing import Annotated

from pydantic import NonNegativeInt, PositiveInt

from miles.core.config.group import Flag, Group


class Checkpoint(Group):
    title = "Checkpointing and Resuming"

    hf_checkpoint: str | None = None
    """Hugging Face checkpoint directory of the model: weights to start from, config and tokenizer, for trainer and
    engines."""

    model_name: str | None = None
    """Model map of the megatron backend (``miles.model_maps``). Defaults to ``model_type`` in ``config.json``."""

    load: str | None = None
    """Run directory to resume from, or weights to start a new run with: a directory in Hugging Face format (for
    megatron also what ``convert_hf_to_torch_dist`` wrote). Left out, a run resumes what is in ``--save``, or starts
    from ``--hf-checkpoint``."""

    save: str | None = None
    """Run directory: metrics, samples, checkpoints."""

    save_interval: PositiveInt | None = None
    """Rollouts between two checkpoints. Needs ``--save``."""

    async_save: bool = False
    """Write checkpoints in the background: training waits only while the state is copied to host memory. A checkpoint
    takes force when it is whole on disk; one is written at a time."""

    save_keep_last: PositiveInt | None = None
    """Checkpoints to keep: when a new one is published, the oldest beyond this number are removed. Left out, all
    stay."""

    skip_broken_checkpoints: bool = False
    """Go on from the newest checkpoint that is whole when the last one is torn or was changed, instead of stopping.
    What was trained after it is trained again."""

    save_hf: str | None = None
    """Directory to export the model to in Hugging Face format with every checkpoint; ``{rollout_id}`` is filled in."""

    no_save_optim: bool = False
    """Leave the optimizer's state out of checkpoints. They are smaller, and training cannot be resumed from them
    exactly."""

    ref_load: Annotated[str | None, Flag(inherits="hf_checkpoint")] = None
    """Checkpoint of the reference model: a directory in Hugging Face format, or a run directory of the same backend,
    whose actor it is then (for megatron also what ``convert_hf_to_torch_dist`` wrote). Defaults to
    ``--hf-checkpoint``."""

    ref_ckpt_step: NonNegativeInt | None = None
    """Checkpoint of the run directory ``--ref-load`` to take, by the number in its name (``iter_0000007``: 7). Defaults
    to the newest."""

    critic_load: Annotated[str | None, Flag(inherits="load")] = None
    """Where a new run takes its critic from: a run directory with checkpoints, or a directory in Hugging Face format,
    like ``--critic-save`` writes; without a value head there (for megatron also what ``convert_hf_to_torch_dist``
    wrote) the critic gets a new one. Defaults to ``--load``; without both the critic starts as ``--hf-checkpoint`` with
    a new value head. A run that is continued goes on with its own critic."""

    critic_save: str | None = None
    """Directory to export the critic to with every checkpoint, in the place of the last one: Hugging Face format plus
    ``value_head.safetensors``. The checkpoints themselves always hold the critic."""

    start_rollout_id: NonNegativeInt | None = None
    """Rollout that a new run begins with. Left out: the one after the checkpoint of ``--load``, or 0. A run that is
    continued goes on where it stood."""

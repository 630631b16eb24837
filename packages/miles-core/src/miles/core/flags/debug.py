"""Looking inside a run, and running one half of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from miles.core.config.group import Flag, Group

Share = Annotated[float, Field(gt=0, le=1)]
ProfileTarget = Literal["train_overall", "train_actor", "train_log_probs"]
_NO_MEMORY_RECORDER = "memory is not recorded yet"
_NO_PROFILER = "the trainer is not profiled yet"


class Debug(Group):
    title = "Debug and Profiling"

    check_weight_update_equal: Annotated[
        bool, Flag(unsupported="the checksums of every weight update are compared anyway")
    ] = False
    """After every weight update, compare a checksum of every tensor the engines hold with what was sent."""

    save_debug_rollout_data: str | None = None
    """File for the samples of every rollout; ``{rollout_id}`` is filled in."""

    load_debug_rollout_data: str | None = None
    """File to read the samples of every rollout from instead of generating them; ``{rollout_id}`` is filled in. Sets
    ``--debug-train-only``."""

    load_debug_rollout_data_subsample: Share | None = None
    """Share of the loaded samples to train on."""

    debug_rollout_only: bool = False
    """Generate rollouts without a trainer."""

    debug_train_only: bool = False
    """Train without engines, on the samples of ``--load-debug-rollout-data``."""

    save_debug_train_data: Annotated[str | None, Flag(unsupported="training batches are not written yet")] = None
    """File for the training batches; ``{rollout_id}`` and ``{rank}`` are filled in."""

    dump_details: str | None = None
    """Directory for everything about the run's data: sets ``--save-debug-rollout-data`` unless it is given."""

    nonfinite_step: Literal["stop", "skip"] = "stop"
    """What becomes of an optimizer step whose loss or gradient is NaN or infinite, after the samples it comes from are
    named: the run stops, or the step is skipped and counted (``train/skipped``)."""

    memory_snapshot_path: Annotated[str, Flag(unsupported=_NO_MEMORY_RECORDER)] = "snapshot.pickle"
    """Name of memory snapshots."""

    record_memory_history: Annotated[bool, Flag(unsupported=_NO_MEMORY_RECORDER)] = False
    """Record the history of memory allocations."""

    memory_snapshot_dir: Annotated[str, Flag(unsupported=_NO_MEMORY_RECORDER)] = "."
    """Directory of memory snapshots."""

    memory_snapshot_num_steps: Annotated[PositiveInt | None, Flag(unsupported=_NO_MEMORY_RECORDER)] = None
    """Steps to record before a snapshot is written."""

    memory_recorder: Annotated[Literal["torch", "memray"], Flag(unsupported=_NO_MEMORY_RECORDER)] = "torch"
    """What records memory."""

    profile_target: Annotated[list[ProfileTarget], Flag(unsupported=_NO_PROFILER)] = Field(
        default_factory=lambda: list[ProfileTarget](["train_overall"])
    )
    """Parts of training to profile."""

    use_pytorch_profiler: Annotated[bool, Flag(unsupported=_NO_PROFILER)] = False
    """Profile with PyTorch's profiler."""

    profile_step_start: Annotated[NonNegativeInt, Flag(unsupported=_NO_PROFILER)] = 10
    """First step to profile."""

    profile_step_end: Annotated[NonNegativeInt, Flag(unsupported=_NO_PROFILER)] = 12
    """Step at which profiling ends."""

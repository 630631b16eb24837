"""Looking inside a run, and running one half of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from miles.core.config.group import Group

Share = Annotated[float, Field(gt=0, le=1)]
ProfileTarget = Literal["train_overall", "train_actor", "train_log_probs"]


class Debug(Group):
    title = "Debug and Profiling"

    check_weight_update_equal: bool = False
    """After the first weight update, fill every tensor of the engines with noise, update again, and compare each with
    what it was: an update that misses a tensor ends the run by its name."""

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

    save_debug_train_data: str | None = None
    """File for what each rank trained on (safetensors, see ``miles.core.training.train_data``); ``{rollout_id}`` and
    ``{rank}`` are filled in."""

    dump_details: str | None = None
    """Directory for everything about the run's data: sets ``--save-debug-rollout-data`` and
    ``--save-debug-train-data`` unless they are given."""

    nonfinite_step: Literal["stop", "skip"] = "stop"
    """What becomes of an optimizer step whose loss or gradient is NaN or infinite, after the samples it comes from are
    named: the run stops, or the step is skipped and counted (``train/skipped``)."""

    watchdog_timeout_s: NonNegativeFloat = 300.0
    """Seconds after which a call of a trainer rank is told on: which rank is at what, with the stacks of its threads in
    ``logs/watchdog-*.log`` of the run. Nothing is interrupted. 0: never."""

    memory_snapshot_path: str = "snapshot.pickle"
    """Name of memory snapshots; ``rank<n>_`` is put before it."""

    record_memory_history: bool = False
    """Record the history of memory allocations."""

    memory_snapshot_dir: str = "."
    """Directory of memory snapshots."""

    memory_snapshot_num_steps: PositiveInt | None = None
    """Rollouts to record before a snapshot is written. Left out: the snapshot is renewed after every rollout
    (``torch``), or everything until the end is recorded (``memray``)."""

    memory_recorder: Literal["torch", "memray"] = "torch"
    """What records memory: ``torch`` the accelerator's allocator, ``memray`` (to be installed) the whole process."""

    profile_target: list[ProfileTarget] = Field(default_factory=lambda: list[ProfileTarget](["train_overall"]))
    """Parts of training to profile."""

    use_pytorch_profiler: bool = False
    """Profile the trainer with PyTorch's profiler: a Chrome trace per rollout, part and rank."""

    profile_step_start: NonNegativeInt = 10
    """First rollout to profile."""

    profile_step_end: NonNegativeInt = 12
    """Rollout at which profiling ends."""

    profile_dir: str | None = None
    """Directory of the traces. Defaults to ``profile`` in ``--save``."""

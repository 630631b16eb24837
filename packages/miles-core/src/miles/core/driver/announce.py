"""What a run says of itself before it starts: what it is about to do, and what changed since it was last started."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles.core.driver.checkpoint import Checkpoint
from miles.core.driver.executor import choose, num_ranks
from miles.core.driver.weights_only import starting_weights
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.checkpoint import Checkpoint as CheckpointFlags
from miles.core.flags.cluster import Cluster
from miles.core.flags.data import Data
from miles.core.flags.training import Training
from miles.core.run_directory import RunDirectory

if TYPE_CHECKING:
    from miles.core.config import Config


def plan(config: Config, run_dir: RunDirectory, resumed: Checkpoint | None) -> str:
    """A few lines: where, with what, how much."""
    rows = [
        ("run", f"{run_dir.path}{_continues(resumed)}"),
        ("model", f"{_model(config[CheckpointFlags], resumed)}, {_trainer(config)}"),
        ("rollout", _batch_equation(config)),
        ("length", _length(config)),
    ]
    return "\n".join(f"{name:8}{text}" for name, text in rows)


def changes(previous: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Flags whose values differ from the last start of this run, as ``lr 1e-06 -> 2e-06``; empty for a new run."""
    if not previous:
        return []
    as_written = json.loads(json.dumps(dict(current), default=str))
    return [
        f"{name} {previous[name]} -> {value}"
        for name, value in as_written.items()
        if name in previous and previous[name] != value
    ]


def _continues(resumed: Checkpoint | None) -> str:
    return f", continued after rollout {resumed.state.rollout_id} ({resumed.path})" if resumed is not None else ""


def _model(flags: CheckpointFlags, resumed: Checkpoint | None) -> str:
    weights = starting_weights(flags)
    elsewhere = resumed is None and weights != Path(flags.hf_checkpoint or "")
    return f"{flags.hf_checkpoint} with the weights of {weights}" if elsewhere else f"{flags.hf_checkpoint}"


def _trainer(config: Config) -> str:
    cluster, training = config[Cluster], config[Training]
    ranks = num_ranks(cluster)
    where = "in this process" if choose(cluster) == "local" else "under Ray"
    count = _counted(ranks)
    if config[Algorithm].uses_critic:
        count += f" and a critic of {_counted(num_ranks(cluster, 'critic'))}"
    return f"trained by {training.train_backend} on {training.device}, {count} {where}"


def _counted(ranks: int) -> str:
    return f"{ranks} ranks" if ranks > 1 else "1 rank"


def _batch_equation(config: Config) -> str:
    data = config[Data]
    samples = f"{data.rollout_batch_size} prompts x {data.n_samples_per_prompt}"
    if config.use_dynamic_global_batch_size:
        return f"{samples} samples = 1 optimizer step of what is left after filtering"
    steps = data.num_steps_per_rollout
    return f"{samples} samples = {steps} optimizer step{'s' if steps != 1 else ''} x {data.global_batch_size}"


def _length(config: Config) -> str:
    data = config[Data]
    parts = [f"{data.num_rollout} rollouts" if data.num_rollout is not None else f"{data.num_epoch} epochs"]
    if config.eval_interval is not None:
        parts.append(f"evaluated every {config.eval_interval}")
    if config[CheckpointFlags].save is not None:
        interval = config[CheckpointFlags].save_interval
        parts.append(f"saved every {interval}" if interval else "saved at the end")
    return ", ".join(parts)

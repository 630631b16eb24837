"""What the head of the page says: what the run is, on what, and what came of it."""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miles.core.report.results import Evaluation
from miles.core.tracking import names
from miles.core.tracking.jsonl import Record
from miles.core.tracking.scoreboard import Scoreboard, duration, number

Config = dict[str, Any]
Fact = dict[str, str]


def headline(config: Config) -> str:
    """``GRPO on Qwen3ForCausalLM, 117,312 parameters``."""
    method = "Supervised fine-tuning" if imitates(config) else _estimator(config)
    model = model_name(config.get("hf_checkpoint"))
    return f"{method} of {model}" if model else method


def imitates(config: Config) -> bool:
    """Whether the run imitates conversations instead of sampling its own."""
    return config.get("loss_type") == "sft_loss"


def results(config: Config, records: Sequence[Record], evaluated: Sequence[Evaluation]) -> list[Fact]:
    """The figures to read first: before and after."""
    facts = []
    for dataset in dict.fromkeys(evaluation.dataset for evaluation in evaluated):
        runs = [evaluation for evaluation in evaluated if evaluation.dataset == dataset]
        first, last = runs[0], runs[-1]
        note = f"pass rate on {last.num_samples} held-out responses ({dataset})"
        facts.append(_change(f"{first.pass_rate:.1%}", f"{last.pass_rate:.1%}", len(runs), note))
        note = f"tokens per response ({dataset})"
        facts.append(_change(number(round(first.mean_length, 1)), number(round(last.mean_length, 1)), len(runs), note))
    rollouts = [record for record in records if record.kind == "rollout"]
    rewards = [record.metrics[names.REWARD] for record in rollouts if names.REWARD in record.metrics]
    if any(rewards) or (rewards and (config.get("rm_type") or config.get("custom_rm_path"))):
        facts.append(_change(f"{rewards[0]:.3g}", f"{rewards[-1]:.3g}", len(rewards), "mean reward in training"))
    losses = [record.metrics[names.LOSS] for record in records if names.LOSS in record.metrics]
    if losses and not facts:
        facts.append(_change(number(losses[0]), number(losses[-1]), len(losses), "training loss"))
    return facts


def facts(config: Config, records: Sequence[Record]) -> list[Fact]:
    """The run in a table: what it was told, how long it took."""
    rollouts = [record for record in records if record.kind == "rollout"]
    table = [
        ("Model", config.get("hf_checkpoint")),
        ("Prompts", config.get("prompt_data")),
        ("Reward", config.get("custom_rm_path") or config.get("rm_type")),
        ("Rollouts", _progress(config, rollouts)),
        ("Batch", _batch(config)),
        ("Learning rate", config.get("lr")),
        ("Trainer", config.get("train_backend")),
        ("Engine", None if config.get("debug_train_only") else config.get("rollout_engine")),
        ("Time", _times(records)),
    ]
    return [{"name": name, "value": str(value)} for name, value in table if value not in (None, "")]


def notes(records: Sequence[Record]) -> list[str]:
    """What looks wrong, as the terminal said it."""
    board = Scoreboard()
    for record in records:
        board.replay(record)
    return board.notes


def model_name(checkpoint: str | None) -> str | None:
    """Architecture and size, as far as the checkpoint's files are still there to say."""
    if checkpoint is None:
        return None
    directory = Path(checkpoint)
    config = directory / "config.json"
    if not config.is_file():
        return directory.name
    architecture: str = (json.loads(config.read_text()).get("architectures") or [directory.name])[0]
    count = sum(num_parameters(file) for file in directory.glob("*.safetensors"))
    return f"{architecture} with {count:,} parameters" if count else architecture


def num_parameters(safetensors: Path) -> int:
    """Numbers in a safetensors file, from its header: 8 bytes of length, then JSON."""
    with safetensors.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _estimator(config: Config) -> str:
    titles = {
        "grpo": "GRPO",
        "gspo": "GSPO",
        "ppo": "PPO",
        "reinforce_plus_plus": "REINFORCE++",
        "reinforce_plus_plus_baseline": "REINFORCE++ with baseline",
        "on_policy_distillation": "On-policy distillation",
    }
    name = str(config.get("advantage_estimator") or "Training")
    return titles.get(name, name)


def _change(first: str, last: str, count: int, note: str) -> Fact:
    return {"first": first if count > 1 else "", "last": last, "note": note}


def _progress(config: Config, rollouts: Sequence[Record]) -> str | None:
    if not rollouts:
        return None
    done, wanted = rollouts[-1].rollout_id + 1, config.get("num_rollout")
    return f"{done} of {wanted}" if wanted and wanted != done else str(done)


def _batch(config: Config) -> str | None:
    prompts, samples = config.get("rollout_batch_size"), config.get("n_samples_per_prompt")
    return f"{prompts} prompts x {samples} samples" if prompts and samples else None


def _times(records: Sequence[Record]) -> str | None:
    if not records:
        return None
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(records[0].time))
    return f"{duration(records[-1].time - records[0].time)}, started {began}"

"""A stage of a recipe: one ``miles train`` command."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).parent
"""On the Python path of every run, so that flags can name the recipes' own functions."""
Value = bool | int | float | str | Path | tuple[str | Path, ...]

CPU_TRAINER: dict[str, Value] = {
    "train-backend": "fsdp",
    "attn-implementation": "sdpa",
    "actor-num-gpus-per-node": 1,
    "device": "cpu",
    "train-num-threads": 1,
    "engine-num-threads": 1,
    "use-dynamic-batch-size": True,
    "max-tokens-per-gpu": 4096,
}
"""One rank on the CPU, samples packed into micro-batches; so small a model gains nothing from more threads."""

FROM_RANDOM_WEIGHTS: dict[str, Value] = {
    "rollout-batch-size": 640,
    "global-batch-size": 64,
    "lr": 4e-3,
    "weight-decay": 0.01,
    "save-interval": 20,
}
"""How a tiny model learns short demonstrations from nothing: 10 optimizer steps of 64 of them per rollout."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What to run.  The run directory is ``--save``, so that the same command continues what was interrupted."""

    directory: Path
    num_rollout: int
    flags: Mapping[str, Value]
    """Flags without their dashes; True stands for a flag without a value."""

    def command(self) -> list[str]:
        """The command line, as a person would type it."""
        words = ["miles", "train", "--save", str(self.directory), "--num-rollout", str(self.num_rollout)]
        for name, value in self.flags.items():
            words.append(f"--{name}")
            if isinstance(value, tuple):
                words += map(str, value)
            elif value is not True:
                words.append(str(value))
        return words

    def finished(self) -> bool:
        """Whether a checkpoint of the last rollout is there."""
        latest = self.directory / "latest_checkpointed_iteration.txt"
        return latest.is_file() and int(latest.read_text()) >= self.num_rollout - 1

    def run(self) -> None:
        """Start or continue the run, unless it is finished; leave the program with its exit status if it fails."""
        if self.finished():
            print(f"Already done: {self.directory}")
            return
        command = self.command()
        print(f"$ PYTHONPATH={RECIPES} {shlex.join(command)}\n", flush=True)
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(RECIPES), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run([str(miles_command()), *command[1:]], check=False, env=env)
        if done.returncode != 0:
            sys.exit(f"\n{self.directory}: the run ended with status {done.returncode}. The same command continues it.")


def imitation_of(
    output: Path, model: Path, rows: Path, *, seed: int, num_rollout: int, flags: Mapping[str, Value]
) -> Stage:
    """Supervised fine-tuning of ``model`` on the conversations ``rows`` (column ``messages``), into ``output/taught``.

    ``flags`` say sizes of batches and learning rate.
    """
    common: dict[str, Value] = {
        "hf-checkpoint": model,
        "save-hf": output / "taught",
        "loss-type": "sft_loss",
        "rollout-function-path": "sft",
        "debug-train-only": True,
        "disable-compute-advantages-and-returns": True,
        "calculate-per-token-loss": True,
        "prompt-data": rows,
        "input-key": "messages",
        "rollout-shuffle": True,
        "lr-decay-style": "cosine",
        "lr-warmup-fraction": 0.05,
        "adam-beta2": 0.95,
        "seed": seed,
        "rollout-seed": seed,
    }
    return Stage(output / "sft", num_rollout, CPU_TRAINER | common | dict(flags))


def miles_command() -> Path:
    """The ``miles`` command of this environment."""
    path = Path(sys.executable).with_name("miles")
    if not path.is_file():
        sys.exit(f"{path} is missing: install miles-core into the environment of {sys.executable}")
    return path

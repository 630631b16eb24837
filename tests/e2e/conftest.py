"""A task small enough to run whole jobs in seconds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "tools" / "recipes"
sys.path.insert(0, str(ROOT / "packages" / "miles-rollout" / "tests"))
sys.path.insert(0, str(RECIPES))
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("router_conformance")

import sglang_environment  # noqa: E402
from warm_runs import WarmRuns  # noqa: E402

from addition import Data, Task, write_data  # noqa: E402
from tiny_lm import Shape, save_checkpoint  # noqa: E402

DEADLINE_S = 420
"""Two servers start in a run that loses one, on a machine that does other things as well."""
MILES = str(Path(sys.executable).with_name("miles"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What takes minutes is made while other tests run."""
    if not session.config.option.collectonly:
        sglang_environment.start_if_wanted(session.items)


def pytest_unconfigure() -> None:
    sglang_environment.stop()


@dataclass(frozen=True)
class Toy:
    """A checkpoint with random weights, and prompts for it."""

    checkpoint: Path
    data: Data

    def flags(self, save: Path, *extra: str) -> list[str]:
        """A GRPO run of four short rollouts, two optimizer steps each, with an evaluation and a save at every one."""
        return [
            *("--train-backend", "fsdp", "--actor-num-gpus-per-node", "1", "--device", "cpu"),
            *("--hf-checkpoint", str(self.checkpoint), "--save", str(save), "--save-interval", "1"),
            *("--prompt-data", str(self.data.train), "--input-key", "prompt", "--label-key", "label"),
            *("--apply-chat-template", "--rollout-shuffle", "--rm-type", "deterministic_random"),
            *("--num-rollout", "4", "--rollout-batch-size", "4", "--n-samples-per-prompt", "4"),
            *("--num-steps-per-rollout", "2", "--rollout-max-response-len", "12"),
            *("--use-dynamic-batch-size", "--max-tokens-per-gpu", "256", "--lr", "1e-2"),
            *("--eval-interval", "2", "--eval-prompt-data", "sums", f"{self.data.evaluation}@[0:8]"),
            *("--train-num-threads", "1", "--engine-num-threads", "1"),
            *extra,
        ]


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("toy")
    data = write_data(folder / "data", Task(num_digits=2, num_demonstrations=64, num_train=64, num_eval=16), seed=0)
    shape = Shape(hidden=32, layers=1, heads=2, kv_heads=1, mlp=64)
    save_checkpoint(folder / "model", ["Calculate 814 + 707."] * 20, vocab_size=300, shape=shape, seed=0)
    return Toy(folder / "model", data)


@pytest.fixture(scope="session")
def warm_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmRuns]:
    runs = WarmRuns(tmp_path_factory.mktemp("output"))
    yield runs
    runs.stop()


@pytest.fixture(scope="session")
def miles(warm_runs: WarmRuns) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the ``miles`` command to its end, with ``variables`` beside the environment's own."""

    def run(*arguments: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        done = warm_runs.run(arguments, variables, DEADLINE_S)
        if check and done.returncode != 0:
            said = f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
            pytest.fail(f"miles {arguments[0]} ended with {done.returncode}\n{said}")
        return done

    return run

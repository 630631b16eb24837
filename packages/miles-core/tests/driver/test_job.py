"""The loop over fake roles: what happens in which order, with which weights, and what a checkpoint carries on."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from miles.core.config import Config
from miles.core.driver import job as job_module
from miles.core.driver import loop, resume
from miles.core.driver.job import Job
from miles.core.errors import CheckpointError, EngineError
from miles.core.flags.checkpoint import Checkpoint
from miles.core.protocols.backend import TrainReport
from miles.core.protocols.rollout import RolloutResult
from miles.core.run_directory import RunDirectory
from miles.core.types.batch import RolloutBatch
from miles.core.weights.sync import SyncReport

DEADLINE_S = 10


class FakeRollout:
    """Makes a rollout of one sample, whose reward is the weight version it was made with."""

    def __init__(self, *, continuous: bool = False, per_epoch: int | None = None) -> None:
        self.version: int | None = None
        self.generated: dict[int, int | None] = {}
        self.evaluated: dict[int, int | None] = {}
        self.stopped = False
        self.memory: list[tuple[str, ...]] = []
        self.training = threading.Event()
        self.waits_for_training = False
        self._continuous, self._per_epoch = continuous, per_epoch

    def launch(self) -> None: ...

    def wait_ready(self) -> None: ...

    def generates_continuously(self) -> bool:
        return self._continuous

    def num_rollouts_per_epoch(self) -> int | None:
        return self._per_epoch

    def generate(self, rollout_id: int) -> RolloutResult:
        version = self.version
        if self.waits_for_training and rollout_id:
            assert self.training.wait(DEADLINE_S), "nobody trained while this rollout was generated"
        assert self.version == version, "the weights changed under a rollout"
        self.generated[rollout_id] = version
        return RolloutResult(batch(rollout_id, float(version or 0)), {"rollout/raw_reward": float(version or 0)})

    def evaluate(self, rollout_id: int) -> dict[str, float]:
        self.evaluated[rollout_id] = self.version
        return {"eval/sums": float(self.version or 0)}

    def progress(self) -> None: ...

    def check_alive(self) -> None: ...

    def engine_urls(self) -> list[str]:
        return ["http://engine"]

    def engines_waiting(self) -> list[str]:
        return []

    def weights_updating(self) -> None: ...

    def release_memory(self, tags: Any) -> int:
        self.memory.append(("released", *tags))
        return 7

    def resume_memory(self, tags: Any) -> None:
        self.memory.append(("resumed", *tags))

    def weights_updated(self, version: int, *_: Any) -> None:
        self.version = version

    def save(self, directory: Path) -> None: ...

    def load(self, directory: Path) -> None: ...

    def stop(self) -> None:
        self.stopped = True


class FakeActors:
    """Takes ``steps`` optimizer steps on every rollout and remembers what it trained on."""

    def __init__(self, rollout: FakeRollout, steps: int = 1) -> None:
        self.trained: list[tuple[int, float]] = []
        self.config: Config | None = None
        self._rollout, self._steps = rollout, steps

    def start(self) -> None: ...

    def train(self, batch: RolloutBatch) -> TrainReport:
        self._rollout.training.set()
        self.trained.append((batch.rollout_id, batch.rewards[0]))
        return TrainReport({}, tuple({"train/loss": float(index)} for index in range(self._steps)))

    def update_weights(self, *_: Any, **__: Any) -> SyncReport:
        self._rollout.memory.append(("sent",))
        return SyncReport()

    def probe_engines(self) -> float | None:
        return None

    def offload(self) -> int:
        self._rollout.memory.append(("trainer sleeps",))
        return 5

    def onload(self) -> None:
        self._rollout.memory.append(("trainer wakes",))

    def save(self, directory: Path) -> None: ...

    def finish_save(self) -> None: ...

    def load(self, directory: Path) -> None: ...

    def save_hf(self, directory: Path) -> None: ...

    def close(self) -> None: ...


class FakeExecutor:
    def __init__(self, rollout: FakeRollout, actors: FakeActors) -> None:
        self._rollout, self._actors = rollout, actors

    def rollout(self, config: Config, run_dir: Path) -> FakeRollout:
        return self._rollout

    def actors(self, config: Config, run_dir: Path) -> FakeActors:
        self._actors.config = config
        return self._actors

    def shutdown(self) -> None: ...


def batch(rollout_id: int, reward: float) -> RolloutBatch:
    return RolloutBatch(
        rollout_id=rollout_id,
        tokens=(np.arange(3),),
        response_lengths=(2,),
        loss_masks=(np.ones(2, np.float32),),
        rewards=(reward,),
        raw_rewards=(reward,),
        truncated=(False,),
        sample_indices=(rollout_id,),
        group_indices=(rollout_id,),
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the loop in one directory; ``until`` ends it before that rollout is trained on, like a kill."""

    def run(rollout: FakeRollout, *, steps: int = 1, until: int | None = None, **values: Any) -> FakeActors:
        flags = {
            "num_rollout": 4, "save": str(tmp_path), "eval_interval": None, "eval_async": False,
            "skip_eval_before_train": False, **values,
        }  # fmt: skip
        config = Config.of(**flags)
        actors = FakeActors(rollout, steps)
        monkeypatch.setattr(job_module, "create", lambda cluster: FakeExecutor(rollout, actors))
        run_dir = RunDirectory(tmp_path).create()
        with Job(config, run_dir, resume.find(config[Checkpoint], tmp_path)) as job:
            if until is not None:
                monkeypatch.setattr(job, "remaining_rollouts", lambda: range(until))
                monkeypatch.setattr(job, "num_rollout", until + 100)
            (loop.run_rollout_only if config.debug_rollout_only else loop.run)(job)
        return actors

    return run


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    import json

    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_synchronous_training_generates_with_the_newest_weights(run):
    rollout = FakeRollout()
    actors = run(rollout)
    assert actors.trained == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    assert rollout.version == 4
    assert rollout.stopped


def test_a_run_without_a_trainer_only_generates(run):
    rollout = FakeRollout()
    assert run(rollout, debug_rollout_only=True, num_rollout=3).trained == []
    assert list(rollout.generated) == [0, 1, 2]


@pytest.mark.parametrize(("keep", "left"), [(None, [0, 1, 2, 3]), (2, [2, 3]), (1, [3])])
def test_so_many_checkpoints_are_kept(run, tmp_path, keep, left):
    run(FakeRollout(), save_interval=1, save_keep_last=keep)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == [f"iter_{number:07d}" for number in left]


def test_a_broken_checkpoint_is_skipped_only_where_that_is_wanted(run, tmp_path):
    run(FakeRollout(), save_interval=1, num_rollout=3)
    (tmp_path / "iter_0000002" / "driver.json").write_text("torn")
    with pytest.raises(CheckpointError, match="--skip-broken-checkpoints"):
        run(FakeRollout(), save_interval=1)
    assert [rollout_id for rollout_id, _ in run(FakeRollout(), skip_broken_checkpoints=True).trained] == [2, 3]


def test_asynchronous_training_generates_the_next_rollout_meanwhile(run):
    rollout = FakeRollout()
    rollout.waits_for_training = True
    actors = run(rollout, async_training=True)
    assert actors.trained == [(0, 0.0), (1, 0.0), (2, 1.0), (3, 2.0)]


def test_weights_are_updated_at_the_interval_and_at_the_end(run):
    rollout = FakeRollout()
    actors = run(rollout, async_training=True, update_weights_interval=2, num_rollout=7, save_interval=100)
    assert actors.trained == [(0, 0.0), (1, 0.0), (2, 0.0), (3, 2.0), (4, 2.0), (5, 4.0), (6, 4.0)]
    assert rollout.version == 7


def test_continuous_rollouts_are_not_begun_ahead(run):
    assert run(FakeRollout(continuous=True), async_training=True).trained == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]


@pytest.mark.parametrize("until", [1, 2, 3])
def test_asynchronous_run_that_is_continued_trains_on_what_it_would_have(run, until):
    whole = [(0, 0.0), (1, 0.0), (2, 1.0), (3, 2.0)]
    first = run(FakeRollout(), until=until, async_training=True, save_interval=1)
    again = FakeRollout()
    second = run(again, async_training=True, save_interval=1)
    assert first.trained + second.trained == whole
    assert until not in again.generated, "the rollout ahead was in the checkpoint"


def test_rollout_ahead_of_a_checkpoint_is_used_by_synchronous_training_too(run):
    run(FakeRollout(), until=2, async_training=True, save_interval=1)
    assert run(FakeRollout()).trained == [(2, 1.0), (3, 3.0)]


def test_optimizer_steps_are_counted_over_a_resume_and_whatever_a_rollout_has(run, tmp_path):
    run(FakeRollout(), steps=3, until=2, save_interval=1)
    run(FakeRollout(), steps=2, save_interval=1)
    assert [event["step"] for event in events(tmp_path, "train")] == list(range(3 + 3 + 2 + 2))


@pytest.mark.parametrize("values", [{}, {"eval_async": True}, {"async_training": True, "eval_async": True}])
def test_evaluations_are_of_the_weights_they_are_logged_for(run, tmp_path, values):
    rollout = FakeRollout()
    run(rollout, eval_interval=2, **values)
    assert rollout.evaluated == {0: 0, 2: 2, 4: 4}
    assert [(event["step"], event["metrics"]["eval/sums"]) for event in events(tmp_path, "eval")] == [
        (0, 0.0),
        (2, 2.0),
        (4, 4.0),
    ]


def test_evaluation_beside_training_does_not_hold_it_up(run):
    rollout = FakeRollout()
    evaluate = rollout.evaluate

    def patient(rollout_id: int) -> dict[str, float]:
        assert rollout.training.wait(DEADLINE_S), "training waits for the evaluation"
        return evaluate(rollout_id)

    rollout.evaluate = patient
    run(rollout, eval_interval=100, eval_async=True)
    assert rollout.evaluated[0] == 0


def test_failure_of_the_rollout_ahead_ends_the_run(run):
    rollout = FakeRollout()
    generate = rollout.generate

    def fail(rollout_id: int) -> RolloutResult:
        if rollout_id == 2:
            raise EngineError("the engine has ended")
        return generate(rollout_id)

    rollout.generate = fail
    with pytest.raises(EngineError, match="has ended"):
        run(rollout, async_training=True)
    assert rollout.stopped


def test_length_in_epochs_is_known_to_the_trainer_before_it_starts(run):
    actors = run(FakeRollout(per_epoch=2), num_rollout=None, num_epoch=2)
    assert [rollout_id for rollout_id, _ in actors.trained] == [0, 1, 2, 3]
    assert actors.config.num_rollout == 4


ALL = ("kv_cache", "cuda_graph", "weights")


def test_trainer_and_engines_take_turns_in_memory(run, tmp_path):
    rollout = FakeRollout()
    run(rollout, offload=True, num_rollout=1, save_interval=1)
    turn_of_engines = [("resumed", "weights"), ("sent",), ("trainer sleeps",), ("resumed", "kv_cache", "cuda_graph")]
    turn_of_trainer = [("released", *ALL), ("trainer wakes",)]
    assert rollout.memory == [("released", *ALL), *turn_of_engines, *turn_of_trainer, *turn_of_engines]
    (event,) = events(tmp_path, "rollout")
    figures = {name: value for name, value in event["metrics"].items() if "_bytes" in name and "ed_" in name}
    assert figures == {"perf/trainer_offloaded_bytes": 5, "perf/engines_released_bytes": 7}
    timed = {"perf/sleep_time", "perf/wake_up_time", "perf/release_engines_time", "perf/resume_engines_time"}
    assert timed <= event["metrics"].keys()


def test_engines_keep_weights_that_are_changed_and_not_sent_whole(run):
    rollout = FakeRollout()
    run(rollout, offload_rollout=True, update_weight_delta=True, num_rollout=1)
    tags = ("kv_cache", "cuda_graph")
    assert rollout.memory == [("released", *tags), ("sent",), ("resumed", *tags)] * 2


def test_the_trainer_alone_may_give_memory_up(run):
    rollout = FakeRollout()
    run(rollout, offload_train=True, num_rollout=1)
    assert rollout.memory == [("sent",), ("trainer sleeps",), ("trainer wakes",), ("sent",), ("trainer sleeps",)]

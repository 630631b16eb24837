from __future__ import annotations

import threading

import numpy as np
import pytest

from miles.core.driver.ahead import FILE, Ahead
from miles.core.driver.background import Background
from miles.core.errors import CheckpointError, EngineError
from miles.core.protocols.rollout import RolloutResult
from miles.core.types.batch import RolloutBatch

DEADLINE_S = 10


def result(rollout_id: int) -> RolloutResult:
    batch = RolloutBatch(
        rollout_id=rollout_id,
        tokens=(np.arange(3),),
        response_lengths=(2,),
        loss_masks=(np.ones(2, np.float32),),
        rewards=(0.5,),
        raw_rewards=(1.0,),
        truncated=(False,),
        sample_indices=(7,),
        group_indices=(3,),
        extra={"anything": ({"deep": [1]},)},
    )
    return RolloutResult(batch, {"rollout/raw_reward": 1.0})


def test_rollout_is_generated_while_the_caller_goes_on():
    may_end = threading.Event()

    def generate(rollout_id: int) -> RolloutResult:
        assert may_end.wait(DEADLINE_S)
        return result(rollout_id)

    ahead = Ahead()
    ahead.begin(5, generate)
    assert ahead.holds(5)
    assert not ahead.holds(6)
    assert ahead.running()
    may_end.set()
    assert ahead.take().batch.rollout_id == 5
    assert not ahead.holds(5)


def test_failure_of_a_generation_is_raised_where_it_is_waited_for():
    def fail(rollout_id: int) -> RolloutResult:
        raise EngineError("the engine has ended")

    ahead = Ahead()
    ahead.begin(5, fail)
    with pytest.raises(EngineError, match="has ended"):
        ahead.wait()


def test_rollout_ahead_survives_a_checkpoint_whole(tmp_path):
    ahead = Ahead()
    ahead.begin(5, result)
    ahead.save(tmp_path)
    restored = Ahead()
    restored.load(tmp_path)
    assert restored.holds(5)
    found = restored.take()
    assert found.metrics == {"rollout/raw_reward": 1.0}
    assert found.batch.tokens[0].tolist() == [0, 1, 2]
    assert found.batch.extra == {"anything": ({"deep": [1]},)}


def test_checkpoint_without_a_rollout_ahead_holds_none(tmp_path):
    Ahead().save(tmp_path)
    assert not list(tmp_path.iterdir())
    restored = Ahead()
    restored.load(tmp_path)
    assert not restored.holds(0)
    restored.wait()


def test_unreadable_rollout_is_a_checkpoint_error(tmp_path):
    (tmp_path / FILE).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="generated ahead cannot be read"):
        Ahead().load(tmp_path)


def test_background_call_hands_over_its_result_and_its_error():
    assert Background(lambda: 3, "three").result() == 3
    with pytest.raises(ZeroDivisionError):
        Background(lambda: 1 / 0, "fails").result()

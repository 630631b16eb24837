"""The rollout function that generates all the time, through the rollout role and a fake engine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rollout_fakes import FakeServer, answer
from test_manager import make, prompts, rewards, server  # noqa: F401  (fixtures)

from miles.core.config import Config
from miles.core.registry import Registry
from miles.core.types.batch import RolloutBatch
from miles.rollout.derive import FULLY_ASYNC_ROLLOUTS
from miles.rollout.fully_async_rollout import generate_rollout_fully_async
from miles.rollout.manager import RolloutManager
from miles.rollout.samples_file import read_groups

Make = Callable[..., RolloutManager]
DEADLINE_S = 60


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def role(make: Make, run: str = "run", **values: Any) -> RolloutManager:  # noqa: F811
    return make(run, rollout_function_path="fully_async", num_rollout=8, **values)


def groups(batch: RolloutBatch) -> list[int]:
    return sorted(set(batch.group_indices))


@pytest.mark.parametrize("name", FULLY_ASYNC_ROLLOUTS)
def test_it_goes_by_its_names_and_trains_asynchronously(name: str) -> None:
    assert Registry("miles.rollouts").get(name) is generate_rollout_fully_async
    assert Config.of(rollout_function_path=name).async_training


def test_engines_are_busy_between_two_rollouts(make: Make, server: FakeServer) -> None:  # noqa: F811
    manager = role(make)
    assert manager.generates_continuously()
    first = manager.generate(0)
    assert len(first.batch) == 6
    until(lambda: len(server.payloads) == 2 * (3 + 3 + 2 * 3))  # what was taken, in work, and may wait
    second = manager.generate(1)
    assert not set(groups(first.batch)) & set(groups(second.batch))
    assert second.metrics["rollout/fully_async/queue_size"] >= 0


def test_staleness_is_known_and_bounded(make: Make, server: FakeServer) -> None:  # noqa: F811
    manager = role(make, max_weight_staleness=1)
    manager.weights_updated(0, manager.engine_urls())
    server.respond = lambda payload: answer(payload, version="0")
    manager.generate(0)
    until(lambda: len(server.payloads) == 2 * 6)
    manager.weights_updated(2, manager.engine_urls())
    server.respond = lambda payload: answer(payload, version="2")
    metrics = manager.generate(2).metrics
    assert metrics["rollout/fully_async/stale_groups_filtered"] == 3
    assert metrics["rollout/fully_async/max_staleness"] == metrics["rollout/avg_staleness"] == 0.0


def test_a_restored_role_trains_on_every_prompt_once(make: Make, server: FakeServer, tmp_path: Path) -> None:  # noqa: F811
    manager = role(make, "a")
    trained = groups(manager.generate(0).batch)
    (tmp_path / "state").mkdir()
    manager.save(tmp_path / "state")
    manager.generate(1)  # lost with the run that is killed here
    restored = role(make, "b")
    restored.load(tmp_path / "state")
    for rollout_id in (1, 2, 3):
        trained += groups(restored.generate(rollout_id).batch)
    (tmp_path / "later").mkdir()
    restored.save(tmp_path / "later")
    held = [group[0].group_index or 0 for group in read_groups(tmp_path / "later" / "stream.json")]
    drawn = json.loads((tmp_path / "later" / "data_source.json").read_text())["group_index"]
    assert len(trained) == 12
    assert sorted(trained + held) == list(range(drawn)), "in exactly one place"


def test_evaluation_goes_on_beside_generation(make: Make, server: FakeServer, tmp_path: Path) -> None:  # noqa: F811
    prompts_path = tmp_path / "prompts.jsonl"
    manager = role(make, eval_interval=1, eval_prompt_data=["again", str(prompts_path)], input_key="input")
    manager.generate(0)
    assert "eval/again" in manager.evaluate(1)
    assert len(manager.generate(1).batch) == 6

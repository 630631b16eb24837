"""A rollout buffer service, and the rollouts that are made of its records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from rollout_fakes import FakeServer
from served_app import ServedApp
from test_manager import make, prompts, rewards, server  # noqa: F401  (fixtures)

from miles.core.config import Config
from miles.core.errors import DataError, RolloutError
from miles.rollout.derive import BUFFER_ROLLOUT
from miles.rollout.manager import RolloutManager

Make = Callable[..., RolloutManager]


def record(instance: int, number: int, **changes: Any) -> dict[str, Any]:
    tokens = [instance, 1, 2, number]
    return {
        "uid": f"{instance}-{number}",
        "instance_id": instance,
        "tokens": tokens,
        "response_length": 2,
        "rollout_log_probs": [-0.5, -0.25],
        "weight_version": "0",
        "reward": float(number),
        "extra_info": {"where": "service"},
        **changes,
    }


class Service(ServedApp):
    """Hands out ``batches``, one per question; counts failures and what it was started with."""

    def __init__(self, batches: list[Any]) -> None:
        super().__init__()
        self.batches = batches
        self.started: list[dict[str, Any]] = []
        self.failures = 0
        self.app.router.add_post("/start_rollout", self._begin)
        self.app.router.add_post("/get_rollout_data", self._give)

    async def _begin(self, request: web.Request) -> web.Response:
        self.started.append(await request.json())
        return web.json_response({"message": "started"})

    async def _give(self, request: web.Request) -> web.Response:
        if self.failures:
            self.failures -= 1
            return web.Response(status=400, text="not now")
        if not self.batches:
            return web.json_response({"success": False})
        return web.json_response({"success": True, "data": {"data": self.batches.pop(0), "meta_info": {}}})


@pytest.fixture
def service() -> Iterator[Service]:
    # Groups arrive in pieces, and more of them than the first rollout needs.
    first = [record(instance, 0) for instance in range(5)]
    second = [record(instance, 1) for instance in range(5)]
    later = [record(instance, number) for instance in (5, 6) for number in (0, 1)]
    with Service([first, second, later]) as service:
        yield service


def role(make: Make, service: Service, run: str = "run", **values: Any) -> RolloutManager:  # noqa: F811
    return make(run, rollout_buffer_url=service.url, rollout_global_dataset=False, num_rollout=9, **values)


def instances(manager: RolloutManager, rollout_id: int) -> list[int]:
    batch = manager.generate(rollout_id).batch
    return [int(tokens[0]) for tokens in batch.tokens[::2]]


def test_records_become_groups_with_the_services_tokens(make: Make, service: Service) -> None:  # noqa: F811
    batch = role(make, service).generate(0).batch
    assert [tokens.tolist() for tokens in batch.tokens[:2]] == [[0, 1, 2, 0], [0, 1, 2, 1]]
    assert batch.group_indices == (0, 0, 1, 1, 2, 2)
    assert batch.raw_rewards[:2] == (0.0, 1.0)
    assert batch.rollout_log_probs is not None
    assert batch.rollout_log_probs[0].tolist() == [-0.5, -0.25]


def test_the_service_is_told_once_where_everything_is(make: Make, service: Service, server: FakeServer) -> None:  # noqa: F811
    manager = role(make, service, rollout_task_type="addition")
    assert instances(manager, 0) + instances(manager, 1) == [0, 1, 2, 3, 4, 5]
    (started,) = service.started
    assert started["remote_engine_url"] == server.url
    assert (started["task_type"], started["num_repeat_per_sample"]) == ("addition", "2")
    assert started["skip_instance_ids"] == []


def test_what_was_trained_on_or_is_held_is_not_made_again_after_a_resume(
    make: Make,  # noqa: F811
    service: Service,
    tmp_path: Path,
) -> None:
    manager = role(make, service, "a")
    assert instances(manager, 0) == [0, 1, 2]
    (tmp_path / "state").mkdir()
    manager.save(tmp_path / "state")
    restored = role(make, service, "b")
    restored.load(tmp_path / "state")
    assert instances(restored, 1) == [3, 4, 5]
    assert service.started[1]["skip_instance_ids"] == ["0", "1", "2", "3", "4"]


def test_a_part_of_the_batch_may_be_enough(make: Make, service: Service) -> None:  # noqa: F811
    service.batches = [[record(0, 0), record(0, 1)]]
    flags = {"min_batch_collection_ratio": 0.3, "use_dynamic_global_batch_size": True}
    assert instances(role(make, service, **flags), 0) == [0]


def test_conversations_are_masked_by_their_template(make: Make, service: Service) -> None:  # noqa: F811
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]
    written = {"instance_id": 0, "reward": 1.0, "messages": messages, "extra_info": {"finish_reason": "length"}}
    service.batches = [[written] * 2]
    manager = role(make, service, min_batch_collection_ratio=0.3, use_dynamic_global_batch_size=True)
    batch = manager.generate(0).batch
    assert batch.truncated == (True, True)
    assert 0 < batch.loss_masks[0].sum() <= batch.response_lengths[0]


def test_failures_in_a_row_are_bounded(make: Make, service: Service) -> None:  # noqa: F811
    service.failures = 2
    assert instances(role(make, service, "a", fetch_trajectory_retry_times=2), 0) == [0, 1, 2]
    service.failures = 100
    with pytest.raises(RolloutError, match=r"no trajectories after 3 attempts in a row.*not now"):
        role(make, service, "b", fetch_trajectory_retry_times=2).generate(0)


def test_a_record_without_a_reward_is_named(make: Make, service: Service) -> None:  # noqa: F811
    service.batches = [[{"instance_id": 0, "messages": []}]]
    with pytest.raises(DataError, match="a record lacks reward"):
        role(make, service).generate(0)


def test_the_flag_chooses_the_function_and_evaluation_still_generates() -> None:
    config = Config.of(rollout_buffer_url="http://service")
    assert config.rollout_function_path == BUFFER_ROLLOUT
    assert config.eval_function_path != BUFFER_ROLLOUT

import pytest

pytest.importorskip("ray")

from miles.core.config import Config
from miles.core.driver.ray_places import EngineLayout
from miles.core.errors import ConfigError


def layout(**values) -> EngineLayout:
    return EngineLayout.of(Config.of(**{"device": "cuda", "num_gpus_per_node": 8, **values}))


def test_engines_on_cpus_are_spread_over_the_nodes_and_take_no_accelerators():
    want = layout(device="cpu", rollout_num_gpus_per_engine=4).want(3)
    assert (want.needs, want.count, want.spread) == ({"CPU": 1.0}, 3, True)


def test_engine_larger_than_a_node_has_all_of_several():
    want = layout(rollout_num_gpus_per_engine=16).want(3)
    assert (want.needs, want.count, want.spread) == ({"CPU": 1.0, "GPU": 8.0}, 6, False)


def test_colocated_engines_are_the_policys_and_a_teacher_has_accelerators_of_its_own():
    shared = layout(colocate=True, actor_num_nodes=2, actor_num_gpus_per_node=8, rollout_num_gpus_per_engine=4)
    assert shared.shared([0, 1, 2, 3, 4]) == [0, 1, 2, 3]
    assert shared.own([0, 1, 2, 3, 4]) == [4]


def test_without_a_trainer_nothing_is_shared():
    alone = layout(colocate=True, actor_num_gpus_per_node=8, debug_rollout_only=True)
    assert alone.own([0, 1]) == [0, 1]


def test_colocated_engines_that_do_not_fit_among_the_ranks_are_refused():
    with pytest.raises(ConfigError, match=r"2 engines share the accelerators of the actor, .* where 1 have room"):
        layout(rollout_num_gpus_per_engine=4).seated([0, 1], [object()])

import pytest

pytest.importorskip("ray")

from miles.core.driver.ray_room import Want, problems

NODES = [{"CPU": 4.0, "GPU": 4.0, "memory": 1e9}, {"CPU": 4.0, "GPU": 4.0}, {"CPU": 8.0}]


def test_what_fits_is_no_problem():
    wants = [Want("engines", {"CPU": 1.0, "GPU": 2.0}, 2), Want("ranks", {"CPU": 1.0, "GPU": 1.0}, 4)]
    assert problems(wants, NODES) == []


def test_no_node_is_large_enough_for_an_engine():
    (problem,) = problems([Want("engines", {"CPU": 1.0, "GPU": 3.0}, 3)], NODES[:2])
    assert problem.startswith(
        "engines 3 x 1 CPU and 3 GPU: the Ray cluster has room for 2 (nodes with 4 CPU and 4 GPU;"
    )


def test_all_nodes_together_are_too_small():
    wants = [Want("engines", {"CPU": 1.0, "GPU": 2.0}, 3), Want("ranks", {"CPU": 1.0, "GPU": 1.0}, 4)]
    (problem,) = problems(wants, NODES)
    assert problem.startswith("this run takes 10 GPU of Ray's, and the cluster has 8")
    assert problem.endswith("6 for engines, 4 for ranks")


def test_processes_without_accelerators_ask_for_none():
    assert problems([Want("ranks", {"CPU": 1.0, "GPU": 0.0}, 2)], [{"CPU": 2.0}]) == []

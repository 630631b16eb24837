import os

import pytest
import torch

from miles.core.errors import EngineError, WeightSyncError
from miles.core.weights.broadcast import BroadcastTransport
from miles.core.weights.delta import ChangeTracker
from miles.core.weights.disk import DiskTransport
from miles.core.weights.engine_client import EngineFleet
from miles.core.weights.shm import SHARED_MEMORY, SharedMemoryTransport, remove_leftovers
from miles.core.weights.sync import push_weights
from miles.core.weights.transport import create_transport


@pytest.fixture(params=[SharedMemoryTransport, DiskTransport])
def transport(request, tmp_path):
    transport = request.param(tmp_path)
    yield transport
    transport.close()


@pytest.fixture
def shm(tmp_path):
    transport = SharedMemoryTransport(tmp_path)
    yield transport
    transport.close()


WEIGHTS = [("embed", torch.randn(10, 4)), ("head", torch.randn(4, 3).bfloat16()), ("bias", torch.randn(3))]


def push(engines, transport, weights=WEIGHTS, version=7, bucket_bytes=100):
    fleet = EngineFleet([engine.url for engine in engines], deadline_s=10)
    try:
        return push_weights(weights, fleet, transport, version=version, bucket_bytes=bucket_bytes)
    finally:
        fleet.close()


def test_every_engine_holds_the_trainers_weights_bit_for_bit(engines, transport):
    report = push(engines, transport)
    for engine in engines:
        assert engine.version == "7"
        assert engine.weights.keys() == dict(WEIGHTS).keys()
        for name, tensor in WEIGHTS:
            assert torch.equal(engine.weights[name], tensor)
    assert report.bytes >= sum(tensor.nbytes for _, tensor in WEIGHTS)
    assert report.timings.keys() == {"pause", "gather", "send", "commit"}


def test_shared_memory_reaches_an_engine_that_answers_as_sglang_does(engines, shm):
    engines[1].answers_like_sglang = True
    push(engines, shm)
    assert all(torch.equal(engines[1].weights[name], tensor) for name, tensor in WEIGHTS)
    engines[1].corrupts.add("bias")
    with pytest.raises(WeightSyncError, match=f"{engines[1].url} does not hold what was sent: bias"):
        push(engines, shm)


@pytest.mark.parametrize(
    ("facts", "kind"),
    [
        ({"engine": "miles-embedded"}, SharedMemoryTransport),
        ({"custom_weight_loader": ["miles_shm"]}, SharedMemoryTransport),
        ({"custom_weight_loader": None}, BroadcastTransport),
    ],
)
def test_auto_takes_shared_memory_where_every_engine_reads_it(engines, tmp_path, facts, kind):
    engines[1].facts = facts
    transport = create_transport("auto", [engine.url for engine in engines], tmp_path)
    assert isinstance(transport, kind)
    transport.close()


def test_auto_broadcasts_to_other_machines(tmp_path):
    transport = create_transport("auto", ["http://203.0.113.1:80"], tmp_path)
    assert isinstance(transport, BroadcastTransport)


def test_generation_is_paused_around_the_update(engines, shm):
    push(engines[:1], shm)
    calls = engines[0].calls
    assert calls[:3] == ["/pause_generation", "/flush_cache", "/begin_weight_update"]
    assert calls[-3:] == ["/end_weight_update", "/update_weight_version", "/continue_generation"]


def test_second_update_with_larger_buckets_reuses_the_transport(engines, shm):
    push(engines, shm, version=1)
    larger = [(name, torch.cat([tensor, tensor])) for name, tensor in WEIGHTS]
    push(engines, shm, larger, version=2, bucket_bytes=1 << 20)
    assert torch.equal(engines[1].weights["embed"], larger[0][1])


def test_engine_that_holds_something_else_stops_the_update_and_names_the_tensor(engines, shm):
    engines[1].corrupts.add("head")
    with pytest.raises(WeightSyncError, match=f"{engines[1].url} does not hold what was sent: head"):
        push(engines, shm)
    assert "/continue_generation" not in engines[0].calls


def test_only_changes_go_to_engines_that_hold_the_version_before(engines, shm):
    tracker = ChangeTracker()
    before = [("embed", torch.zeros(1000)), ("head", torch.zeros(1000))]
    after = [("embed", torch.zeros(1000)), ("head", torch.zeros(1000).index_fill_(0, torch.tensor([5]), 2.0))]
    fleet = EngineFleet([engines[0].url], deadline_s=10)

    def push_version(weights, version):
        return push_weights(weights, fleet, shm, version=version, bucket_bytes=1 << 20, tracker=tracker)

    assert push_version(before, 1).bytes == 8000
    engines[0].facts = {"weight_version": "1"}
    with pytest.raises(WeightSyncError):  # this fake does not apply changes
        push_version(after, 2)
    sent = engines[0].payloads["/update_weights_from_tensor"]
    assert sent["delta"] == {"base_version": "1", "tensors": {"head": {"dtype": "float32", "count": 1}}}
    assert [tensor["name"] for tensor in sent["bucket"]["tensors"]] == ["head"]
    assert push_version(after, 3).bytes == 8000, "after a failure everything is sent"
    engines[0].facts = {"weight_version": "another"}
    assert push_version(after, 4).bytes == 8000
    fleet.close()


def test_a_failed_update_is_closed_so_that_another_one_can_begin(engines, shm):
    engines[1].corrupts.add("head")
    with pytest.raises(WeightSyncError):
        push(engines, shm)
    assert [engine.calls[-1] for engine in engines] == ["/end_weight_update"] * 2


def test_an_update_that_breaks_off_in_mid_copy_keeps_no_engine_waiting(engines, shm):
    unreadable = torch.empty(3, device="meta")
    with pytest.raises(RuntimeError, match="meta tensor"):
        push(engines, shm, [("embed", torch.ones(5)), ("head", unreadable)])
    push(engines, shm)
    assert all(torch.equal(engine.weights[name], tensor) for engine in engines for name, tensor in WEIGHTS)


def test_engine_that_refuses_stops_the_update_with_its_words(engines, shm):
    engines[0].refuses.add("/begin_weight_update")
    with pytest.raises(EngineError, match=r"begin_weight_update answered 400: .*refused"):
        push(engines, shm)


def test_engine_that_is_gone_is_named():
    fleet = EngineFleet(["http://127.0.0.1:9"], deadline_s=5)
    with pytest.raises(EngineError, match=r"http://127.0.0.1:9: POST /x got no answer \(ConnectionRefused"):
        fleet.post("/x")


def test_disk_transport_leaves_no_files(engines, tmp_path):
    transport = DiskTransport(tmp_path)
    push(engines, transport)
    transport.close()
    assert list(tmp_path.iterdir()) == []


def test_an_update_by_disk_after_one_that_failed_sends_its_own_files_only(engines, tmp_path):
    transport, engine = DiskTransport(tmp_path), engines[0]
    engine.refuses.add("/update_weights_from_disk")
    with pytest.raises(EngineError, match="refused"):
        push([engine], transport, [("lost", torch.ones(2)), ("lost too", torch.ones(2))], bucket_bytes=1)
    engine.refuses.clear()
    push([engine], transport, [("kept", torch.ones(2))])
    assert list(engine.weights) == ["kept"]
    push([engine], transport, [("later", torch.ones(2))], version=8)
    assert list(engine.weights) == ["kept", "later"]
    transport.close()


def test_shared_memory_is_unlinked_and_leftovers_of_dead_owners_are_removed(tmp_path):
    transport = SharedMemoryTransport(tmp_path)
    mine = list(SHARED_MEMORY.glob(f"miles-{os.getpid()}-*"))
    assert mine
    transport.close()
    assert not any(path.exists() for path in mine)
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    (tmp_path / f"miles-{dead}-x").touch()
    (tmp_path / f"miles-{os.getpid()}-x").touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"miles-{os.getpid()}-x"]

"""What the flags of weight updates change on the wire."""

from __future__ import annotations

import pytest
import torch

from miles.core.config import Config
from miles.core.errors import EngineError
from miles.core.flags.training import Training
from miles.core.weights.sender import WeightSender

WEIGHTS = [(f"layer.{number}", torch.randn(64)) for number in range(4)]  # 256 bytes each


@pytest.fixture
def send(engines, tmp_path):
    """``send(flag=value, ...)``: one update with these flags."""
    made = []

    def run(**flags):
        made.append(WeightSender(Config.of(train_backend="fsdp", **flags)[Training], tmp_path, deadline_s=10.0))
        return made[-1].send(WEIGHTS, [engine.url for engine in engines], version=1)

    yield run
    for sender in made:
        sender.close()


@pytest.mark.parametrize(("size", "messages"), [(1024, 1), (512, 2), (1, 4)])
def test_weights_travel_in_pieces_of_the_buffer_size(engines, send, size, messages):
    send(update_weight_buffer_size=size, update_weight_transport="shm")
    for engine in engines:
        assert engine.calls.count("/update_weights_from_tensor") == messages


@pytest.mark.parametrize("mode", ["retract", "abort", "in_place"])
def test_generation_is_paused_as_the_flag_says(engines, send, mode):
    send(pause_generation_mode=mode)
    assert all(engine.payloads["/pause_generation"] == {"mode": mode} for engine in engines)


@pytest.mark.parametrize(
    ("transport", "call"), [("shm", "/update_weights_from_tensor"), ("disk", "/update_weights_from_disk")]
)
def test_the_transport_is_the_one_that_is_named(engines, send, transport, call):
    send(update_weight_transport=transport)
    assert all(call in engine.calls for engine in engines)


def test_changes_are_sent_to_engines_that_take_them_only(engines, send):
    with pytest.raises(EngineError, match=r"--update-weight-delta: the engine at .* takes whole tensors only"):
        send(update_weight_delta=True)
    engines[0].facts["weight_delta"] = True
    engines[1].facts = {"custom_weight_loader": ["miles_shm", "miles_weight_delta"]}
    report = send(update_weight_delta=True, update_weight_transport="shm")
    assert report.metrics()["perf/update_weights_density"] == 1  # engines had nothing before


@pytest.mark.parametrize(
    "own", [{}, {"disable_radix_cache": True}, {"custom_weight_loader": ["miles_shm", "miles_versioned_prefixes"]}]
)
def test_engines_in_flight_must_keep_prefixes_of_other_weights_apart(engines, send, own):
    for engine in engines:
        engine.facts = own
    if own:
        send(pause_generation_mode="in_place", update_weight_transport="shm")
    else:
        with pytest.raises(EngineError, match=r"in_place: the engine at .* would use prefixes that old weights"):
            send(pause_generation_mode="in_place", update_weight_transport="shm")

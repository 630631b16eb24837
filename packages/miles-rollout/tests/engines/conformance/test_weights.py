"""Weights sent to every engine as a trainer sends them."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace

import pytest
import torch
from engine_client import PROMPT

from miles.core.errors import EngineError, WeightSyncError
from miles.core.weights.broadcast import BroadcastTransport
from miles.core.weights.bucket import buckets
from miles.core.weights.delta import ChangeTracker
from miles.core.weights.disk import DiskTransport
from miles.core.weights.engine_client import EngineFleet
from miles.core.weights.shm import SharedMemoryTransport
from miles.core.weights.sync import push_weights
from miles.core.weights.transport import create_transport

SAMPLED = {"max_new_tokens": 20, "sampling_seed": 3, "ignore_eos": True}


@pytest.fixture(scope="module", autouse=True)
def _as_they_were(served):
    """The engine serves other tests as well."""
    yield
    fleet = EngineFleet([served.url], deadline_s=60)
    fleet.post("/update_weights_from_disk", {"model_path": str(served.path), "weight_version": "default"})
    fleet.close()


@pytest.fixture
def fleet(served):
    fleet = EngineFleet([served.url], deadline_s=60)
    yield fleet
    fleet.close()


def changed(model, seed):
    """Other weights, loaded into ``model`` and returned under their names in a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return checkpoint_names(model)


def checkpoint_names(model):
    """Named tensors as files have them: every expert by itself."""
    named = {}
    for name, tensor in model.state_dict().items():
        prefix, _, kind = name.rpartition(".experts.")
        if not prefix:
            named[name] = tensor
            continue
        for expert, weight in enumerate(tensor):
            halves = weight.chunk(2) if kind == "gate_up_proj" else (weight,)
            for part, half in zip(
                ("gate_proj", "up_proj") if len(halves) == 2 else ("down_proj",), halves, strict=True
            ):
                named[f"{prefix}.experts.{expert}.{part}.weight"] = half.contiguous()
    return named


def push(fleet, transport, weights, version, **options):
    return push_weights(weights.items(), fleet, transport, version=version, bucket_bytes=1 << 16, **options)


async def assert_holds(client, model, version):
    answer = await client.generate(sampling_params=SAMPLED, return_logprob=True)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT + answer["output_ids"]])).logits[0, 3:-1].float().log_softmax(-1)
    got = answer["meta_info"]["output_token_logprobs"]
    assert [entry[0] for entry in got] == pytest.approx(
        [row[token].item() for row, token in zip(expected, answer["output_ids"], strict=True)], abs=5e-5
    )
    assert answer["meta_info"]["weight_version"] == version
    assert (await client.get("/model_info"))[1]["weight_version"] == version


@pytest.fixture(params=[SharedMemoryTransport, BroadcastTransport, DiskTransport])
def transport(request, served, tmp_path):
    if (served.name, request.param) == ("embedded", BroadcastTransport):
        pytest.skip("both ends of a process group would be in this process; tests/e2e has them in two")
    transport = request.param(tmp_path)
    yield transport
    transport.close()


async def test_pushed_weights_are_held_and_stamped(client, fleet, reference, transport):
    weights = changed(reference, seed=len(type(transport).__name__))
    report = await asyncio.to_thread(push, fleet, transport, weights, 7)
    assert report.bytes >= sum(tensor.nbytes for tensor in weights.values())
    await assert_holds(client, reference, "7")


async def test_changes_become_the_weights_themselves(client, fleet, reference, transport):
    tracker = ChangeTracker()
    weights = checkpoint_names(reference)
    await asyncio.to_thread(push, fleet, transport, weights, 40, tracker=tracker)
    for parameter in reference.parameters():
        parameter.data.view(-1)[::17] += 0.01
    report = await asyncio.to_thread(push, fleet, transport, checkpoint_names(reference), 41, tracker=tracker)
    assert 0 < report.bytes < report.whole_bytes / 2
    await assert_holds(client, reference, "41")


async def test_changes_of_a_version_that_is_not_held_are_refused(client, fleet, reference, tmp_path):
    transport, tracker = SharedMemoryTransport(tmp_path), ChangeTracker()
    await asyncio.to_thread(push, fleet, transport, checkpoint_names(reference), 50, tracker=tracker)
    (bucket,) = buckets(tracker.changes(changed(reference, seed=2).items()), 1 << 24)
    unfounded = replace(bucket, change=tracker.describe("49", [slot.name for slot in bucket.slots]))
    await client.ok("/begin_weight_update")
    with pytest.raises(EngineError, match="these are changes of version 49; 50 is held"):
        await asyncio.to_thread(transport.send, unfounded, fleet, 51)
    transport.close()
    await client.ok("/end_weight_update")


async def test_auto_finds_shared_memory(served, tmp_path):
    transport = await asyncio.to_thread(create_transport, "auto", [served.url], tmp_path)
    assert isinstance(transport, SharedMemoryTransport)
    transport.close()


def log_probs(model, tokens):
    """[N] of the tokens after the prompt."""
    with torch.no_grad():
        rows = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1].float().log_softmax(-1)
    return rows[range(len(tokens)), tokens].tolist()


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_requests_in_flight_survive_an_update_and_tell_who_made_what(client, fleet, reference, tmp_path, mode):
    transport = SharedMemoryTransport(tmp_path)
    await asyncio.to_thread(push, fleet, transport, checkpoint_names(reference), 20)
    before = copy.deepcopy(reference)
    params = {"max_new_tokens": 400, "temperature": 0.0, "ignore_eos": True}
    tasks = [client.start(sampling_params=params, return_logprob=True) for _ in range(4)]
    await client.generate(sampling_params={**params, "max_new_tokens": 30})
    await asyncio.to_thread(push, fleet, transport, changed(reference, seed=1), 21, pause_mode=mode)
    transport.close()
    for answer in await asyncio.gather(*tasks):
        assert answer["meta_info"]["finish_reason"]["type"] == "length"
        old, new = answer["meta_info"]["weight_versions"]
        assert (old["version"], old["start"], new["version"], new["end"]) == ("20", 0, "21", 400)
        assert 0 < old["end"] == new["start"] < 400
        told = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        cut, tokens = old["end"], answer["output_ids"]
        assert told[:cut] == pytest.approx(log_probs(before, tokens)[:cut], abs=5e-5)
        if mode == "retract":  # in place, keys and values of the old weights stay in use
            assert told[cut:] == pytest.approx(log_probs(reference, tokens)[cut:], abs=5e-5)
    await assert_holds(client, reference, "21")  # and uses no prefix of the old weights


async def test_a_tensor_that_the_model_does_not_take_stops_the_update(client, fleet, reference, transport):
    weights = {**checkpoint_names(reference), "model.layers.0.nobody.weight": torch.zeros(3)}
    with pytest.raises((WeightSyncError, EngineError), match="nobody"):
        await asyncio.to_thread(push, fleet, transport, weights, 9)
    await client.post("/end_weight_update")  # unless the sender has done it
    await client.ok("/continue_generation")


async def test_an_update_outside_a_session_is_refused(client):
    assert (await client.post("/end_weight_update"))[0] == 400
    await client.ok("/begin_weight_update")
    assert (await client.post("/begin_weight_update"))[0] == 400
    await client.ok("/end_weight_update")


async def test_the_version_alone_can_change(client):
    await client.ok("/update_weight_version", {"new_version": "4", "abort_all_requests": False})
    assert (await client.generate())["meta_info"]["weight_version"] == "4"


async def test_checksums_of_what_is_held_follow_the_weights(client, fleet, reference, tmp_path):
    async def checksums():
        return (await client.ok("/weights_checker", {"action": "checksum"}))["ranks"][0]["checksums"]

    transport = SharedMemoryTransport(tmp_path)
    same = checkpoint_names(reference)
    await asyncio.to_thread(push, fleet, transport, same, 30)
    before = await checksums()
    await asyncio.to_thread(push, fleet, transport, same, 31)
    assert await checksums() == before
    await asyncio.to_thread(push, fleet, transport, {"model.norm.weight": torch.zeros(48)}, 32)
    transport.close()
    after = await checksums()
    assert {name for name in before if before[name] != after[name]} == {"model.norm.weight"}


async def test_noise_in_place_of_weights_is_found_until_all_of_them_are_sent_again(client, fleet, reference, tmp_path):
    transport, same = SharedMemoryTransport(tmp_path), checkpoint_names(reference)
    await asyncio.to_thread(push, fleet, transport, same, 60)
    await client.ok("/weights_checker", {"action": "snapshot"})
    await client.ok("/weights_checker", {"action": "reset_tensors"})
    status, answer = await client.post("/weights_checker", {"action": "compare"})
    assert (status, answer["success"]) == (400, False)
    assert "model.embed_tokens.weight" in answer["message"]
    await asyncio.to_thread(push, fleet, transport, same, 61)
    transport.close()
    await client.ok("/weights_checker", {"action": "compare"})


async def test_a_missing_directory_is_refused(client):
    status, answer = await client.post("/update_weights_from_disk", {"model_path": "/nowhere"})
    assert (status, answer["success"]) == (400, False)
    assert len((await client.generate())["output_ids"]) == 8

import pytest
import torch

from miles.core.flags.training import Training
from miles.core.weights.sender import WeightSender


@pytest.fixture(params=[False, True])
def sender(request, tmp_path):
    flags = Training(update_weight_transport="shm", update_weight_delta=request.param, train_backend="fsdp")
    sender = WeightSender(flags, tmp_path, deadline_s=10, remembers=True)
    yield sender
    sender.close()


def test_an_engine_that_comes_later_gets_what_the_others_have(engines, sender):
    first, second = engines[:2]
    for engine in (first, second):
        engine.facts["weight_delta"] = True
    weights = {"a": torch.randn(5), "b": torch.randn(7).bfloat16()}
    sent = {name: tensor.clone() for name, tensor in weights.items()}
    sender.send(weights.items(), [first.url], 4)
    for tensor in weights.values():
        tensor.add_(1)
    sender.send_again([second.url], 4)
    assert second.version == "4"
    for name, tensor in sent.items():
        assert torch.equal(second.weights[name], tensor)
    sender.send(weights.items(), [first.url, second.url], 5)
    for engine in (first, second):
        assert engine.version == "5"
        assert torch.equal(engine.weights["a"], weights["a"])

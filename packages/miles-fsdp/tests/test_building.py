"""What flags ask of the place where a rank computes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from miles.core.protocols.backend import Rank
from miles.fsdp import building
from miles.fsdp.sharding import Backends

VOCABULARY = 96


class HeadProducts(TorchDispatchMode):
    """Rows of every product with the head."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and "mm" in str(function) and result.shape[-1:] == (VOCABULARY,):
            self.rows.append(result.shape[0])
        return result


@pytest.mark.parametrize(("size", "largest"), [(4, 4), (16, 16), (-1, 80)])
def test_log_probabilities_are_computed_in_chunks_of_that_many_tokens(actor, rollout, size, largest):
    batch = rollout(responses=[10] * 8)
    made = actor(log_probs_chunk_size=size, micro_batch_size=8)
    with HeadProducts() as products:
        found = made.log_probs(batch)
    assert max(products.rows) == largest
    assert sum(products.rows) == 80
    for logp, expected in zip(found, actor().log_probs(batch), strict=True):
        torch.testing.assert_close(torch.tensor(logp), torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("margin", "share"), [(0, 1.0), (1024, 0.75), (8192, 0.0)])
def test_the_margin_of_an_accelerators_memory_is_left_free(config, monkeypatch, margin, share):
    asked = []
    properties = type("Properties", (), {"total_memory": 4096})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: asked.append(given))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    building.Site.join(config(device="cuda", train_dtype="fp32", train_memory_margin_bytes=margin), Rank())
    assert asked == [(share, torch.device("cuda", 0))]


@pytest.mark.parametrize("library", ["gloo", None])
def test_tensors_in_host_memory_have_a_library_beside_the_accelerators(config, monkeypatch, library):
    joined = []
    monkeypatch.setattr(building, "join_group", lambda rank, device, backends, *_: joined.append(backends))
    building.Site.join(config(train_dtype="bf16", fsdp_cpu_backend=library, distributed_backend="nccl"), Rank())
    assert joined == [Backends("nccl", library)]


def test_libraries_are_spelled_as_torch_wants_it():
    assert Backends("nccl", "gloo").spelled("cuda") == "cpu:gloo,cuda:nccl"
    assert Backends("nccl", None).spelled("cuda") == "nccl"
    assert Backends("gloo", "gloo").spelled("cpu") == "gloo"

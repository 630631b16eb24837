import sys

import pytest
import torch

from miles.rollout.engines.sglang.environment import SERVER_PACKAGES

sys.path.insert(0, str(SERVER_PACKAGES))

from miles_sglang.copy_watch import CopyWatch


@pytest.fixture
def watch():
    """Two tensors that share memory, and one by itself."""
    memory = torch.randn(9)
    return CopyWatch({"q": memory[:6].view(2, 3), "k": memory[6:].view(1, 3), "norm": torch.full((3,), 0.5).bfloat16()})


def test_weights_that_are_laid_out_anew_are_held(watch):
    fused, norm = torch.zeros(3, 3), torch.zeros(3)
    with watch:
        for name, tensor in watch.tensors.items():
            if name == "norm":
                norm.copy_(tensor)  # in another precision
            else:
                fused.narrow(0, 0 if name == "q" else 2, len(tensor)).copy_(tensor)
    assert watch.held(whole=True) == {"q", "k", "norm"}


def test_a_weight_that_goes_through_another_tensor_is_held(watch):
    held = torch.zeros(3, 2)
    with watch:
        made = watch.tensors["q"].t().contiguous() * 2
        held.copy_(made)
    assert watch.held(whole=True) == {"q"}


def test_what_is_skipped_or_taken_in_part_is_not_held(watch):
    held = torch.zeros(1, 3)
    with watch:
        held.copy_(watch.tensors["q"][:1])
    assert watch.held(whole=True) == set()
    assert watch.held(whole=False) == {"q"}, "a rank of several holds its part"


def test_what_is_overwritten_afterwards_is_not_held(watch):
    held = torch.zeros(1, 3)
    with watch:
        held.copy_(watch.tensors["k"])
        held.zero_()
    assert watch.held(whole=True) == set()


def test_what_shares_the_memory_is_known(watch):
    assert watch.is_ours(watch.tensors["q"][1:].t())
    assert not watch.is_ours(watch.tensors["q"].clone())
    assert not watch.is_ours(torch.empty(0))

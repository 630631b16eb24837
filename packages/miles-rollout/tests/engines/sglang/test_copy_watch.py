import sys

import pytest
import torch

from miles.rollout.engines.sglang.environment import SERVER_PACKAGES

sys.path.insert(0, str(SERVER_PACKAGES))

from miles_sglang.copy_watch import CopyWatch

ENTRIES = [
    {"name": "q", "dtype": "float32", "shape": [2, 3], "offset": 0},
    {"name": "k", "dtype": "float32", "shape": [1, 3], "offset": 64},
    {"name": "norm", "dtype": "bfloat16", "shape": [3], "offset": 128},
]


@pytest.fixture
def watch():
    memory = torch.randint(0, 100, (192,), dtype=torch.uint8)
    watch = CopyWatch(memory, ENTRIES)
    tensors = dict(watch.tensors())
    tensors["q"].normal_()
    tensors["k"].normal_()
    tensors["norm"].fill_(0.5)
    return watch


def test_tensors_lie_where_their_entries_say(watch):
    tensors = dict(watch.tensors())
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == {
        "q": ((2, 3), torch.float32),
        "k": ((1, 3), torch.float32),
        "norm": ((3,), torch.bfloat16),
    }
    assert watch.spans == {"q": (0, 24), "k": (64, 76), "norm": (128, 134)}


def test_weights_that_are_laid_out_anew_are_held(watch):
    fused, norm = torch.zeros(3, 3), torch.zeros(3)
    with watch:
        for name, tensor in watch.tensors():
            if name == "norm":
                norm.copy_(tensor)  # in another precision
            else:
                fused.narrow(0, 0 if name == "q" else 2, len(tensor)).copy_(tensor)
    assert watch.held(whole=True) == {"q", "k", "norm"}


def test_a_weight_that_goes_through_another_tensor_is_held(watch):
    held = torch.zeros(3, 2)
    with watch:
        made = dict(watch.tensors())["q"].t().contiguous() * 2
        held.copy_(made)
    assert watch.held(whole=True) == {"q"}


def test_what_is_skipped_or_taken_in_part_is_not_held(watch):
    held = torch.zeros(1, 3)
    with watch:
        held.copy_(dict(watch.tensors())["q"][:1])
    assert watch.held(whole=True) == set()
    assert watch.held(whole=False) == {"q"}, "a rank of several holds its part"


def test_what_is_overwritten_afterwards_is_not_held(watch):
    held = torch.zeros(1, 3)
    with watch:
        held.copy_(dict(watch.tensors())["k"])
        held.zero_()
    assert watch.held(whole=True) == set()

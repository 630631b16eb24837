import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.core.weights.delta import Change, ChangeTracker, decode, encode

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8]


@st.composite
def pairs(draw):
    """A tensor, and the same with some elements changed."""
    dtype = draw(st.sampled_from(DTYPES))
    size = draw(st.integers(1, 2000))
    old = torch.randint(-100, 100, (size,), generator=torch.Generator().manual_seed(size)).to(dtype)
    new = old.clone()
    for index in draw(st.lists(st.integers(0, size - 1), max_size=20)):
        new[index] += 1
    return old, new


@given(pairs())
def test_a_change_leads_from_the_old_tensor_to_the_new_one(pair):
    old, new = pair
    change, count = encode(old, new)
    index, values = decode(change, new.dtype, count)
    patched = old.clone()
    patched[index] = values
    assert torch.equal(patched, new)
    assert count == int((old != new).sum())


def test_bits_count_not_values():
    old = torch.tensor([0.0, math.nan, 1.0])
    new = torch.tensor([-0.0, math.nan, 1.0])
    change, count = encode(old, new)
    index, values = decode(change, torch.float32, count)
    assert index.tolist() == [0]
    assert math.copysign(1, values[0]) == -1


@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 509, 510, 511, 5000])
def test_gaps_of_any_length(gap):
    old = torch.zeros(6000)
    new = old.clone()
    new[gap], new[-1] = 1, 2
    change, count = encode(old, new)
    assert decode(change, torch.float32, count)[0].tolist() == [gap, 5999]


def test_a_change_of_one_element_in_a_hundred_is_a_sixtieth_of_the_tensor():
    old = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    new = old.clone()
    new[torch.randperm(100_000, generator=torch.Generator().manual_seed(1))[:1000]] += 1
    assert encode(old, new)[0].numel() / old.nbytes < 0.017


@pytest.mark.parametrize(("change", "count"), [([1, 2], 1), ([0, 0, 0, 0, 255], 1), ([0] * 5, 2)])
def test_what_is_no_change_is_refused(change, count):
    with pytest.raises(ValueError, match="are not a change"):
        decode(torch.tensor(change, dtype=torch.uint8), torch.float32, count)


def test_equal_tensors_are_left_out_and_dense_changes_are_sent_whole():
    tracker = ChangeTracker()
    tensors = {"same": torch.zeros(1000), "dense": torch.zeros(1000), "sparse": torch.zeros(1000)}
    assert [name for name, _ in tracker.whole(tensors.items())] == list(tensors)
    tracker.finish("3")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["dense"] += 1
    tensors["sparse"][7] = 1
    sent = dict(tracker.changes(tensors.items()))
    assert sent.keys() == {"dense", "sparse"}
    assert torch.equal(sent["dense"], tensors["dense"])
    assert tracker.entries == {"sparse": ("float32", 1)}
    assert sent["sparse"].numel() == 5
    assert tracker.version is None, "half sent"
    tracker.finish("4")
    assert dict(tracker.changes(tensors.items())) == {}


def test_a_change_is_described_in_json():
    change = Change("3", {"a": ("bfloat16", 7)})
    assert Change.of_json(change.to_json()) == change

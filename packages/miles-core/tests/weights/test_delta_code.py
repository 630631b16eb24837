import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.core.weights.delta_code import apply, encode

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8]


def patched(old, change, count):
    held = old.clone()
    apply(change, count, held)
    return held


def bits(tensor):
    return tensor.view(-1).view(torch.uint8).tolist()


@st.composite
def pairs(draw):
    """A tensor, and the same with some elements changed: to a neighbour, to a near number, or to any."""
    dtype = draw(st.sampled_from(DTYPES))
    size = draw(st.integers(1, 2000))
    old = torch.randint(0, 100, (size,), generator=torch.Generator().manual_seed(size)).to(dtype)
    new = old.clone()
    raw = new.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[new.itemsize])
    for index in draw(st.lists(st.integers(0, size - 1), max_size=20)):
        raw[index] += draw(st.sampled_from([1, -1, 2, 127, -128, 128]) if new.itemsize > 1 else st.integers(-100, 27))
    return old, new


@given(pairs())
def test_a_change_leads_from_the_old_tensor_to_the_new_one(pair):
    old, new = pair
    change, count = encode(old, new)
    assert bits(patched(old, change, count)) == bits(new)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.0, -1e30, 1e-40])
def test_bits_count_not_values(value):
    old = torch.tensor([0.0, math.nan, 1.0])
    new = torch.tensor([value, math.nan, 1.0])
    change, count = encode(old, new)
    assert count == 1
    assert bits(patched(old, change, count)) == bits(new)


def test_integers_at_the_ends_of_their_range():
    ends = torch.tensor([2**63 - 1, -(2**63), 0, -(2**63)])
    change, count = encode(ends, ends.flip(0))
    assert torch.equal(patched(ends, change, count), ends.flip(0))


@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 509, 510, 511, 5000])
def test_gaps_of_any_length(gap):
    old = torch.zeros(6000)
    new = old.clone()
    new[gap], new[-1] = 1, 2
    assert torch.equal(patched(old, *encode(old, new)), new)


def test_a_step_of_one_element_in_a_hundred_is_a_hundred_and_sixtieth_of_the_tensor():
    old = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    new = old.clone()
    new.view(torch.int16)[torch.randperm(100_000, generator=torch.Generator().manual_seed(1))[:1000]] += 1
    assert encode(old, new)[0].numel() / old.nbytes < 1 / 160


def test_what_is_no_change_is_refused():
    change, count = encode(torch.zeros(9), torch.tensor([0.0, 1, 2, 0, 0, 0, 0, 0, 9]))
    for wrong in (change[:-1], change[:4], change[:0], torch.cat([change, change[:1]]), change.flip(0)):
        with pytest.raises(ValueError, match="not a change"):
            apply(wrong, count, torch.zeros(9))
    with pytest.raises(ValueError, match="not a change of 2 values"):
        apply(change, 2, torch.zeros(9))


def test_a_change_beyond_the_end_is_refused():
    with pytest.raises(ValueError, match="element 9 of 9"):
        apply(*encode(torch.zeros(10), torch.arange(10) // 9 * 1.0), torch.zeros(9))

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.core.weights.checksum import checksum, copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@given(data=st.data())
def test_a_flipped_bit_and_exchanged_values_show(dtype, data):
    tensor = torch.randint(0, 100, (7, 9), generator=torch.Generator().manual_seed(1)).to(dtype)
    raw = tensor.clone().view(-1).view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(raw) != checksum(tensor)
    assert checksum(tensor[[1, 0, 2, 3, 4, 5, 6]]) != checksum(tensor)


def test_elements_count_in_their_order_whatever_their_strides():
    tensor = torch.arange(12.0).view(3, 4)
    assert checksum(tensor.t()) == checksum(tensor.t().contiguous()) != checksum(tensor)
    assert checksum(torch.empty(0)) == checksum(torch.empty(0, 3))


def test_memory_can_be_released_afterwards():
    tensor = torch.ones(8)
    checksum(tensor)
    assert tensor.untyped_storage().resizable()


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(0,), (3, 5), (700, 1100)])
def test_a_copy_tells_what_the_target_holds(source, target, shape):
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(source)
    room = torch.empty(shape, dtype=target)
    assert copy(room, given) == checksum(given)
    assert torch.equal(room.to(source), given)


def test_a_copy_tells_of_precision_that_was_lost():
    given = torch.randn(9, generator=torch.Generator().manual_seed(1))
    assert copy(torch.empty(9, dtype=torch.bfloat16), given) != checksum(given)


def test_strides_do_not_matter():
    given = torch.arange(12.0).view(3, 4)
    room = torch.empty(4, 3)
    assert copy(room.t(), given) == checksum(given)
    assert torch.equal(room.t(), given)

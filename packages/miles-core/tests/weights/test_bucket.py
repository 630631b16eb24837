import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.core.weights.bucket import ALIGNMENT, buckets

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64]


@st.composite
def named_tensors(draw):
    shapes = draw(st.lists(st.lists(st.integers(0, 7), max_size=3), max_size=12))
    return [(f"t{i}", torch.randint(0, 100, shape).to(draw(st.sampled_from(DTYPES)))) for i, shape in enumerate(shapes)]


@given(named_tensors(), st.integers(1, 2000))
def test_tensors_lie_one_behind_another_in_their_order(tensors, limit):
    seen = []
    for bucket in buckets(tensors, limit):
        end = 0
        for slot, tensor in zip(bucket.slots, bucket.tensors, strict=True):
            assert torch.equal(tensor, dict(tensors)[slot.name])
            assert end <= slot.offset < end + ALIGNMENT
            end = slot.offset + tensor.nbytes
            seen.append(slot.name)
        assert end <= bucket.nbytes < end + ALIGNMENT
    assert seen == [name for name, _ in tensors]


@given(named_tensors(), st.integers(ALIGNMENT, 2000))
def test_only_a_single_larger_tensor_exceeds_the_limit(tensors, limit):
    for bucket in buckets(tensors, limit):
        assert bucket.nbytes <= limit or len(bucket.slots) == 1


def test_slots_are_aligned_and_described_in_json():
    bucket = next(buckets([("a", torch.zeros(3)), ("b", torch.zeros(2, 2, dtype=torch.bfloat16))], 1 << 20))
    assert [slot.offset for slot in bucket.slots] == [0, ALIGNMENT]
    assert bucket.slots[1].to_json() == {"name": "b", "dtype": "bfloat16", "shape": [2, 2], "offset": ALIGNMENT}

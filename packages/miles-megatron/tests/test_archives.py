import io

import pytest
import torch

from miles.megatron.archives import frame_of

TENSORS = {
    "a matrix": torch.arange(12, dtype=torch.bfloat16).view(3, 4),
    "one value": torch.tensor(3.0),
    "bytes, an odd number": torch.arange(7, dtype=torch.uint8),
    "more than a page": torch.arange(5000, dtype=torch.float16).view(50, 100),
}


@pytest.mark.parametrize("name", TENSORS)
def test_values_in_a_frame_are_read_as_the_tensor_they_are(name):
    tensor = TENSORS[name]
    frame = frame_of(tensor.dtype, tensor.shape)
    values = bytes(tensor.reshape(-1).view(torch.uint8).numpy())
    read = torch.load(io.BytesIO(frame.before + values + frame.after), weights_only=True)
    assert read.dtype == tensor.dtype
    assert torch.equal(read, tensor)


def test_checksums_of_other_writers_stay_on():
    frame_of(torch.float32, torch.Size([2]))
    assert torch.serialization.get_crc32_options()

from pathlib import Path

import pytest
import torch

from miles.core.errors import EngineError
from miles.core.weights.checksum import checksum
from miles.core.weights.shared_ring import RingLayout, RingWriter
from miles.rollout.engines.embedded.protocol import BadRequest
from miles.rollout.engines.embedded.shared_bucket import BucketTensor, SharedBucket, SharedMemory
from miles.rollout.engines.embedded.weights import WeightError

ENTRY = {"name": "a", "dtype": "bfloat16", "shape": [2, 3], "offset": 64}
LAYOUT = RingLayout(2, 4096)


def described(path: Path, **other):
    plain = {"path": str(path), "num_readers": 2, "ring_bytes": 4096, "reader": 1, "tensors": [ENTRY]}
    return plain | other


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "bucket"
    path.write_bytes(bytes(LAYOUT.num_bytes))
    return path


def write(file: Path, tensor: torch.Tensor) -> None:
    memory = torch.from_file(str(file), shared=True, size=LAYOUT.num_bytes, dtype=torch.uint8)
    RingWriter(memory, LAYOUT, check=lambda: None).write(64, tensor)


def test_a_tensor_comes_as_it_was_written_again_and_again(file):
    memory = SharedMemory()
    for number in range(3):
        sent = torch.full((2, 3), number, dtype=torch.bfloat16)
        write(file, sent)
        ((name, incoming),) = memory.incoming(SharedBucket.parse(described(file)))
        held = torch.empty(2, 3, dtype=torch.bfloat16)
        assert (name, incoming.copy_into(held)) == ("a", checksum(sent))
        assert torch.equal(held, sent)


def test_another_file_is_mapped(file, tmp_path):
    memory = SharedMemory()
    write(file, torch.zeros(2, 3, dtype=torch.bfloat16))
    memory.incoming(SharedBucket.parse(described(file)))
    other = tmp_path / "other"
    other.write_bytes(bytes(LAYOUT.num_bytes))
    write(other, torch.ones(2, 3, dtype=torch.bfloat16))
    ((_, incoming),) = memory.incoming(SharedBucket.parse(described(other)))
    assert torch.equal(incoming.whole(), torch.ones(2, 3, dtype=torch.bfloat16))


def test_a_missing_or_short_file_is_named(file, tmp_path):
    with pytest.raises(EngineError, match=r"cannot open the bucket .*nowhere: No such file"):
        SharedMemory().incoming(SharedBucket.parse(described(tmp_path / "nowhere")))
    with pytest.raises(EngineError, match=r"bucket is shorter than its 9192 bytes"):
        SharedMemory().incoming(SharedBucket.parse(described(file, ring_bytes=9000)))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"ring_bytes": "x"}, "path, num_readers, ring_bytes, reader and tensors"),
        ({"tensors": None}, "path, num_readers, ring_bytes, reader and tensors"),
        ({"reader": 2}, "reader 2 of 2"),
        ({"ring_bytes": 0}, "a ring of 0 bytes"),
    ],
)
def test_a_malformed_bucket_is_refused(file, other, said):
    with pytest.raises(BadRequest, match=said):
        SharedBucket.parse(described(file, **other))
    with pytest.raises(BadRequest, match="bucket must be an object"):
        SharedBucket.parse(None)


@pytest.mark.parametrize(
    "entry", [{"name": "a"}, {"name": "a", "dtype": "float99", "shape": [1], "offset": 0}, {"dtype": "float32"}]
)
def test_a_malformed_entry_is_shown(entry):
    with pytest.raises(WeightError, match=r"float99|needs name, dtype, shape and offset"):
        BucketTensor.parse(entry)

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.core.errors import WeightSyncError
from miles.core.weights.bucket import buckets
from miles.core.weights.checksum import checksum
from miles.core.weights.shared_ring import STEP_BYTES, Incoming, RingLayout, RingReader, RingWriter

DTYPES = [torch.float32, torch.bfloat16, torch.int64]


def memory_of(layout):
    return torch.zeros(layout.num_bytes, dtype=torch.uint8)


def fine():
    """No reader has failed."""


def stream(tensors, layout, like=torch.empty_like):
    """What every reader holds of the tensors, and the checksums of all sides."""
    (bucket,) = buckets([(str(number), tensor) for number, tensor in enumerate(tensors)], 1 << 40)
    memory = memory_of(layout)
    writer = RingWriter(memory, layout, fine)

    def read(number):
        reader = RingReader(memory, layout, number, patience_s=30.0)
        targets = [like(tensor) for tensor in tensors]
        incoming = [
            Incoming(reader, slot.offset, tensor.dtype, tensor.shape)
            for slot, tensor in zip(bucket.slots, tensors, strict=True)
        ]
        return targets, [one.copy_into(target) for one, target in zip(incoming, targets, strict=True)]

    with ThreadPoolExecutor(max(1, layout.num_readers)) as pool:
        held = [pool.submit(read, number) for number in range(layout.num_readers)]
        written = [writer.write(slot.offset, tensor) for slot, tensor in zip(bucket.slots, tensors, strict=True)]
        return [one.result() for one in held], written


@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from(DTYPES)), max_size=6), st.integers(64, 4096))
def test_readers_hold_what_was_written_however_small_the_ring(specs, ring_bytes):
    tensors = [torch.randint(-99, 99, (length,)).to(dtype) for length, dtype in [*specs, (1, torch.int64)]]
    held, written = stream(tensors, RingLayout(2, ring_bytes))
    assert written == [checksum(tensor) for tensor in tensors]
    for targets, checksums in held:
        assert checksums == written
        assert all(torch.equal(target, tensor) for target, tensor in zip(targets, tensors, strict=True))


def test_large_tensors_pass_through_in_steps():
    tensors = [torch.randn(3 * STEP_BYTES // 4 + 5), torch.randn(7, 9).t(), torch.randn(STEP_BYTES // 2)]
    held, written = stream(tensors, RingLayout(1, 2 * STEP_BYTES))
    ((targets, checksums),) = held
    assert checksums == written
    assert all(torch.equal(target, tensor) for target, tensor in zip(targets, tensors, strict=True))


def test_targets_in_another_precision_tell_what_they_hold():
    exact, lossy = torch.arange(8.0), torch.full((8,), 0.1)
    held, written = stream([exact, lossy], RingLayout(1, 64), like=lambda tensor: tensor.bfloat16())
    ((targets, checksums),) = held
    assert checksums[0] == written[0] == checksum(exact)
    assert checksums[1] == checksum(lossy.bfloat16().float()) != written[1]
    assert torch.equal(targets[1], lossy.bfloat16())


def test_a_ring_that_holds_the_stream_needs_no_reader():
    layout, tensor = RingLayout(3, 4096), torch.randn(1000)
    memory = memory_of(layout)
    assert RingWriter(memory, layout, fine).write(0, tensor) == checksum(tensor)
    late = torch.empty(1000)
    assert RingReader(memory, layout, 2).read(0, late) == checksum(tensor)


def test_a_reader_takes_nothing_before_it_is_there():
    layout = RingLayout(1, 4096)
    memory, target = memory_of(layout), torch.zeros(1000)
    RingWriter(memory, layout, fine).write(0, torch.ones(500))
    with pytest.raises(WeightSyncError, match=r"stopped at byte 2000 of the update, 0\.01 s ago"):
        RingReader(memory, layout, 0, patience_s=0.01).read(0, target)
    assert not target.any()


def test_a_writer_does_not_wait_for_a_reader_that_has_failed():
    def gone():
        raise WeightSyncError("the engine is gone")

    layout = RingLayout(1, 64)
    writer = RingWriter(memory_of(layout), layout, gone)
    with pytest.raises(WeightSyncError, match="the engine is gone"):
        writer.write(0, torch.ones(100))


def test_a_trainer_that_gives_up_ends_the_wait():
    layout = RingLayout(1, 64)
    memory = memory_of(layout)
    writer = RingWriter(memory, layout, fine)
    failed = []

    def read():
        with pytest.raises(WeightSyncError, match="gave the update up"):
            RingReader(memory, layout, 0).read(0, torch.empty(9))
        failed.append(True)

    reader = threading.Thread(target=read)
    reader.start()
    writer.give_up()
    reader.join(30)
    assert failed

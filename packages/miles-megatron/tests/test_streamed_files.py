import weakref

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

from miles.megatron.streamed_files import StreamingWriter, save_alone

COUNT = 5


class Planner(dcp.DefaultSavePlanner):
    """Makes each tensor when it is asked for, and sees how many of those before are still there."""

    def __init__(self):
        super().__init__()
        self.made, self.alive = [], []

    def resolve_data(self, write_item):
        self.alive.append(sum(values() is not None for values in self.made))
        values = np.full(8, float(write_item.index.fqn), dtype=np.float32)
        self.made.append(weakref.ref(values))
        return torch.from_numpy(values)


def test_no_tensor_is_held_until_the_next_and_stock_readers_read_them(tmp_path):
    planner = Planner()
    state = {str(number): torch.empty(8) for number in range(COUNT)}
    save_alone(state, StreamingWriter(tmp_path), planner)
    assert planner.alive == [0] * COUNT
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path), no_dist=True)
    assert all(torch.equal(tensor, torch.full((8,), float(name))) for name, tensor in state.items())

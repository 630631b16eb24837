import pytest
import torch

from miles.megatron.mapped_items import MappedItems

TENSORS = {
    "a matrix": torch.arange(12, dtype=torch.bfloat16).view(3, 4),
    "a transposed one": torch.arange(12.0).view(3, 4).t(),
    "part of a storage": torch.arange(12.0)[5:9],
    "one value": torch.tensor(3),
    "nothing": torch.empty(0, 4),
    "bytes, an odd number": torch.arange(7, dtype=torch.uint8),
}


@pytest.fixture
def saved(tmp_path):
    """All tensors in one file, with where each begins and how long it is."""
    places = {}
    with (tmp_path / "items").open("wb") as file:
        for name, tensor in TENSORS.items():
            start = file.tell()
            torch.save(tensor, file)
            places[name] = start, file.tell() - start
    return MappedItems(tmp_path / "items"), places


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_as_it_was_saved(saved, name):
    items, places = saved
    read = items.tensor(*places[name])
    assert read.dtype == TENSORS[name].dtype
    assert read.stride() == TENSORS[name].stride()
    assert torch.equal(read, TENSORS[name])


def test_a_change_of_the_tensor_leaves_the_file(saved, tmp_path):
    items, places = saved
    items.tensor(*places["a matrix"]).zero_()
    assert torch.equal(MappedItems(tmp_path / "items").tensor(*places["a matrix"]), TENSORS["a matrix"])

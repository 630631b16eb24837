import torch

from miles.core.weights.delta import Change, ChangeTracker


def test_equal_tensors_are_left_out_and_dense_changes_are_sent_whole():
    tracker = ChangeTracker()
    tensors = {name: torch.zeros(1000) for name in ("same", "dense", "sparse")} | {"empty": torch.zeros(0)}
    assert [name for name, _ in tracker.whole(tensors.items())] == list(tensors)
    tracker.finish("3")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["dense"] += 1
    tensors["sparse"][7] = 1
    sent = dict(tracker.changes(tensors.items()))
    assert sent.keys() == {"dense", "sparse"}
    assert torch.equal(sent["dense"], tensors["dense"])
    assert tracker.entries == {"sparse": ("float32", 1)}
    assert sent["sparse"].numel() < 40
    assert tracker.version is None, "half sent"
    tracker.finish("4")
    assert dict(tracker.changes(tensors.items())) == {}


def test_a_change_is_described_in_json():
    change = Change("3", {"a": ("bfloat16", 7)})
    assert Change.of_json(change.to_json()) == change

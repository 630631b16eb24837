from __future__ import annotations

import sys

import pytest
import torch

from miles.core.weights import delta_code
from miles.core.weights.delta import ChangeTracker
from miles.rollout.engines.sglang.environment import SERVER_PACKAGES

sys.path.insert(0, str(SERVER_PACKAGES))

from miles_sglang import changes


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setenv(changes.VARIABLE, delta_code.__file__)
    return changes.wanted()


def test_nothing_is_kept_for_a_trainer_that_sends_whole_tensors(monkeypatch):
    monkeypatch.delenv(changes.VARIABLE, raising=False)
    assert changes.wanted() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_the_trainer_sends_is_made_whole_bit_by_bit(kept, dtype):
    weights = {"a": torch.randn(40, 5, dtype=dtype), "b": torch.randn(3, dtype=dtype), "still": torch.ones(2)}
    tracker = ChangeTracker()
    kept.take(dict(tracker.whole(weights.items())), None, "0")
    for version in ("0", "1", "2"):
        tracker.finish(version)
        weights["a"][::7] *= 1.01
        weights["b"] += 1
        sent = dict(tracker.changes(weights.items()))
        whole = kept.take(sent, tracker.describe(version, sent).to_json(), version)
        assert set(whole) == {"a", "b"}
        for name, tensor in whole.items():
            assert torch.equal(tensor, weights[name])


def test_later_changes_of_the_trainers_tensor_are_not_seen(kept):
    weights = {"a": torch.zeros(3)}
    whole = kept.take(weights, None, "0")
    weights["a"].fill_(7)
    assert torch.equal(whole["a"], torch.zeros(3))


def test_changes_of_something_else_are_refused(kept):
    change, count = delta_code.encode(torch.zeros(4), torch.ones(4))
    told = {"base_version": "3", "tensors": {"a": {"dtype": "float32", "count": count}}}
    with pytest.raises(ValueError, match="changes of version 3; 4 is held"):
        kept.take({"a": change}, told, "4")
    with pytest.raises(ValueError, match="a: nothing in float32 is kept"):
        kept.take({"a": change}, told, "3")
    kept.take({"a": torch.zeros(4).bfloat16()}, None, "2")
    with pytest.raises(ValueError, match="a: nothing in float32 is kept"):
        kept.take({"a": change}, told, "3")

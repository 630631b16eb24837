import numpy as np

from miles.core.types import RolloutBatch


def batch() -> RolloutBatch:
    return RolloutBatch(
        rollout_id=4,
        tokens=(np.arange(3), np.arange(5), np.arange(2)),
        response_lengths=(1, 2, 1),
        loss_masks=tuple(np.ones(n, dtype=np.float32) for n in (1, 2, 1)),
        rewards=(0.1, 0.2, 0.3),
        raw_rewards=(1.0, 2.0, 3.0),
        truncated=(False, True, False),
        sample_indices=(10, 11, 12),
        group_indices=(5, 5, 6),
        extra={"weight": ("a", "b", "c")},
    )


def test_length_counts_samples_and_total_lengths_count_tokens():
    assert len(batch()) == 3
    assert batch().total_lengths == (3, 5, 2)


def test_selection_takes_every_column_in_the_given_order():
    chosen = batch().select([2, 0])
    assert chosen.rollout_id == 4
    assert chosen.sample_indices == (12, 10)
    assert chosen.total_lengths == (2, 3)
    assert chosen.extra == {"weight": ("c", "a")}
    assert chosen.rollout_log_probs is None

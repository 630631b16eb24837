import numpy as np
import torch

from miles.core.training.micro_batch import pack, pack_filler, response_offsets
from miles.core.types.batch import RolloutBatch

CPU = torch.device("cpu")


def rollout(*samples):
    """A rollout of (prompt tokens, response tokens)."""
    tokens = tuple(np.array(prompt + response) for prompt, response in samples)
    responses = tuple(len(response) for _, response in samples)
    count = len(samples)
    return RolloutBatch(
        rollout_id=0,
        tokens=tokens,
        response_lengths=responses,
        loss_masks=tuple(np.ones(r, np.float32) for r in responses),
        rewards=(0.0,) * count,
        raw_rewards=(0.0,) * count,
        truncated=(False,) * count,
        sample_indices=tuple(range(count)),
        group_indices=(0,) * count,
    )


BATCH = rollout(([1, 2], [3, 4, 5]), ([6], [7]), ([8, 9, 10], []))


def test_samples_lie_end_to_end_with_their_own_positions():
    micro_batch = pack(BATCH, [1, 0], response_offsets(BATCH), CPU)
    assert micro_batch.tokens_P.tolist() == [6, 7, 1, 2, 3, 4, 5]
    assert micro_batch.positions_P.tolist() == [0, 1, 0, 1, 2, 3, 4]
    assert micro_batch.segments.lengths == (2, 5)


def test_the_token_before_predicts_each_response_token():
    micro_batch = pack(BATCH, [1, 0], response_offsets(BATCH), CPU)
    assert micro_batch.targets_T.tolist() == [7, 3, 4, 5]
    assert micro_batch.rows_T.tolist() == [0, 3, 4, 5]
    assert torch.equal(micro_batch.tokens_P[micro_batch.rows_T + 1], micro_batch.targets_T)


def test_response_tokens_know_their_place_in_the_rollout():
    assert pack(BATCH, [1, 0], response_offsets(BATCH), CPU).columns_T.tolist() == [3, 0, 1, 2]


def test_a_sample_without_response_contributes_no_targets():
    micro_batch = pack(BATCH, [2, 1], response_offsets(BATCH), CPU)
    assert micro_batch.layout.lengths == (0, 1)
    assert micro_batch.targets_T.tolist() == [7]


def test_a_filler_computes_but_trains_on_nothing():
    micro_batch = pack_filler(BATCH, 0, response_offsets(BATCH), CPU)
    assert len(micro_batch.tokens_P) == 5
    assert len(micro_batch.targets_T) == 0


def test_a_prompt_that_samples_share_is_packed_once():
    shared = rollout(([1, 2], [3, 4]), ([9], [8]), ([1, 2], [5]))
    micro_batch = pack(shared, [0, 1, 2], response_offsets(shared), CPU)
    assert micro_batch.tokens_P.tolist() == [1, 2, 3, 4, 9, 8, 5]
    assert micro_batch.positions_P.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert micro_batch.targets_T.tolist() == [3, 4, 8, 5]
    assert micro_batch.rows_T.tolist() == [1, 2, 4, 1]
    assert micro_batch.segments.end_to_end.token_of_cell.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 6]


def test_the_same_first_tokens_in_a_longer_prompt_are_not_shared():
    different = rollout(([1, 2], [3]), ([1, 2, 3], [4]))
    assert len(pack(different, [0, 1], response_offsets(different), CPU).tokens_P) == 7

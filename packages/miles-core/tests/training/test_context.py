"""Shares of a pack as attention sees them, without processes: a group here is only an index and a count."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.core.training.bucket_attention import attend_by_buckets, sdpa_bucket
from miles.core.training.micro_batch import pack, response_offsets
from miles.core.types.batch import RolloutBatch

CPU = torch.device("cpu")


@dataclass
class Share:
    """One rank of a group whose exchange is played back from what ``whole`` holds of all tokens."""

    index: int
    count: int
    whole: object = None

    def gather(self, own):
        return self.whole


@st.composite
def rollouts(draw):
    """Samples of few prompts, so that some share theirs."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    prompts = [rng.integers(0, 50, rng.integers(1, 9)) for _ in range(2)]
    responses = draw(st.lists(st.integers(0, 20), min_size=1, max_size=5))
    count = len(responses)
    return RolloutBatch(
        rollout_id=0,
        tokens=tuple(np.concatenate([prompts[i % 2], rng.integers(0, 50, r)]) for i, r in enumerate(responses)),
        response_lengths=tuple(responses),
        loss_masks=tuple(np.ones(r, np.float32) for r in responses),
        rewards=(0.0,) * count,
        raw_rewards=(0.0,) * count,
        truncated=(False,) * count,
        sample_indices=tuple(range(count)),
        group_indices=(0,) * count,
    )


def shares(batch, count):
    samples, offsets = range(len(batch)), response_offsets(batch)
    return [pack(batch, samples, offsets, CPU, Share(index, count)) for index in range(count)]


@given(rollouts(), st.integers(1, 4))
def test_the_shares_hold_every_response_token_once_with_what_predicts_it(batch, count):
    whole = pack(batch, range(len(batch)), response_offsets(batch), CPU)
    parts = shares(batch, count)
    assert len({len(part.tokens_P) for part in parts}) == 1
    assert torch.cat([part.columns_T for part in parts]).sort()[0].tolist() == whole.columns_T.tolist()
    predicted = {
        int(column): (int(part.tokens_P[row]), int(part.positions_P[row]), int(target))
        for part in (*parts, whole)
        for column, row, target in zip(part.columns_T, part.rows_T, part.targets_T, strict=True)
    }
    for part in parts:
        assert part.layout.num_tokens == len(part.columns_T)
        for column, row, target in zip(part.columns_T, part.rows_T, part.targets_T, strict=True):
            assert predicted[int(column)] == (int(part.tokens_P[row]), int(part.positions_P[row]), int(target))


@settings(deadline=None, max_examples=40)
@given(rollouts(), st.integers(1, 4), st.sampled_from([None, 4]))
def test_attention_of_the_shares_is_attention_of_the_whole(batch, count, window):
    whole = pack(batch, range(len(batch)), response_offsets(batch), CPU)
    draw = torch.Generator().manual_seed(0)
    q_P, k_P, v_P = (torch.randn(len(whole.tokens_P), heads, 4, generator=draw) for heads in (4, 2, 2))
    expected = attend_by_buckets(sdpa_bucket, q_P, k_P, v_P, whole.segments, None, window)
    held = [torch.from_numpy(part.segments.held) for part in shares(batch, count)]
    everyones = torch.cat([torch.cat((k_P, v_P), -1)[tokens] for tokens in held])
    for part, tokens in zip(shares(batch, count), held, strict=True):
        part.segments.group.whole = everyones
        out = attend_by_buckets(sdpa_bucket, q_P[tokens], k_P[tokens], v_P[tokens], part.segments, None, window)
        own = torch.from_numpy(part.segments.place_of_token >= 0)
        places = torch.from_numpy(part.segments.place_of_token)[own]
        torch.testing.assert_close(out[places], expected[own], atol=1e-5, rtol=1e-5)


@given(rollouts(), st.integers(1, 4))
def test_runs_of_a_kernel_of_variable_lengths_end_with_the_last_query(batch, count):
    for part in shares(batch, count):
        queries, keys = part.segments.query_runs, part.segments.key_runs
        assert len(queries.offsets) == len(keys.offsets)
        assert len(queries.cells.token_of_cell) == len(part.tokens_P) == queries.offsets[-1]
        position_of_key = torch.cat([torch.arange(n) for n in keys.offsets.diff().tolist()])
        last = part.positions_P[queries.cells.token_of_cell[queries.offsets[1:].long() - 1]]
        assert (position_of_key[keys.offsets[1:].long() - 1] >= last).all()

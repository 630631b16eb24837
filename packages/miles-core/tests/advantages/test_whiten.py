import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.core.advantages.whiten import whiten
from miles.core.oracle import advantages

TOKENS = st.lists(st.tuples(st.floats(-10, 10), st.booleans()), min_size=1, max_size=20).filter(
    lambda tokens: any(trains for _, trains in tokens)
)


@settings(deadline=None)
@given(TOKENS)
def test_whitened_advantages_equal_the_oracle(tokens):
    x, mask = np.array(tokens, dtype=np.float64).T.copy()
    (expected,) = advantages.whitened([x], [mask])
    np.testing.assert_allclose(whiten(torch.tensor(x), torch.tensor(mask)), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(TOKENS, st.data())
def test_ranks_with_parts_of_the_tokens_agree_with_one_rank(tokens, data):
    """Also where a rank has no token at all: it takes part in the sum."""
    x_A, mask_A = torch.tensor(tokens, dtype=torch.float64).T
    cuts = sorted(data.draw(st.lists(st.integers(0, len(x_A)), min_size=2, max_size=2)))
    ranks = list(zip(x_A.tensor_split(cuts), mask_A.tensor_split(cuts), strict=True))
    contributions = []
    for x_r, mask_r in ranks:
        with pytest.raises(_Stopped):
            whiten(x_r, mask_r, _recording(contributions))
    total = sum(contributions)
    parts = [whiten(x_r, mask_r, lambda _: total) for x_r, mask_r in ranks]
    torch.testing.assert_close(torch.cat(parts), whiten(x_A, mask_A))


class _Stopped(Exception):
    pass


def _recording(contributions):
    def all_reduce(sums):
        contributions.append(sums)
        raise _Stopped

    return all_reduce


def test_statistics_are_those_of_trainable_tokens():
    x_A = torch.tensor([1.0, 3.0, 100.0])
    found = whiten(x_A, torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(found, (x_A - 2.0) / 2.0**0.5)


def test_a_single_token_becomes_zero():
    assert whiten(torch.tensor([5.0]), torch.ones(1)).tolist() == [0.0]


def test_no_trainable_token_is_an_error():
    with pytest.raises(ValueError, match="no token of this rollout trains"):
        whiten(torch.ones(2), torch.zeros(2))

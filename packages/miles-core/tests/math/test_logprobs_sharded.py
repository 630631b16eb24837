"""A head divided among ranks, which are threads here: what they hand each other is added up between two barriers."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.core.math.logprobs import linear_logprobs

DEADLINE_S = 20


class ThreadShard:
    """``VocabularyShard`` of one of several threads."""

    def __init__(self, first, rank, slots, barrier):
        self.first = first
        self._rank, self._slots, self._barrier = rank, slots, barrier

    def sum(self, x):
        return self._reduced(x, lambda all_x: all_x.sum(0))

    def max(self, x):
        return self._reduced(x, lambda all_x: all_x.amax(0))

    def _reduced(self, x, reduce):
        self._slots[self._rank] = x.detach().clone()
        self._barrier.wait(DEADLINE_S)
        result = reduce(torch.stack(self._slots))
        self._barrier.wait(DEADLINE_S)
        return x.copy_(result)


def scored(hidden, weight, bias, target, shard=None, **options):
    """Scores, and the gradients of a loss that depends on all of them."""
    inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    scores = linear_logprobs(inputs[0], inputs[1], target, bias_V=inputs[2], shard=shard, **options)
    values = [x for x in scores if x is not None]
    total = sum((x * torch.arange(1.0, len(x) + 1, dtype=x.dtype)).sum() for x in values)
    return [x.detach() for x in values], torch.autograd.grad(total, inputs)


def scored_on_threads(sizes, hidden, weight, bias, target, **options):
    slots, barrier = [None] * len(sizes), threading.Barrier(len(sizes))
    firsts = [sum(sizes[:rank]) for rank in range(len(sizes))]

    def on_rank(rank):
        rows = slice(firsts[rank], firsts[rank] + sizes[rank])
        shard = ThreadShard(firsts[rank], rank, slots, barrier)
        return scored(hidden, weight[rows], bias[rows], target, shard, **options)

    with ThreadPoolExecutor(len(sizes)) as pool:
        return list(pool.map(on_rank, range(len(sizes))))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    tokens=st.integers(0, 7),
    chunk_size=st.none() | st.integers(1, 4),
    temperature=st.sampled_from([1.0, 0.7]),
    with_entropy=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_divided_head_scores_and_learns_like_a_whole_one(sizes, tokens, chunk_size, temperature, with_entropy, seed):
    draw = torch.Generator().manual_seed(seed)
    vocabulary = sum(sizes)
    hidden, weight, bias = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((tokens, 5), (vocabulary, 5), (vocabulary,))
    )
    target = torch.randint(vocabulary, (tokens,), generator=draw)
    options = {"chunk_size": chunk_size, "temperature": temperature, "with_entropy": with_entropy}
    values, (hidden_grad, weight_grad, bias_grad) = scored(hidden, weight, bias, target, **options)
    ranks = scored_on_threads(sizes, hidden, weight, bias, target, **options)
    for rank_values, (rank_hidden_grad, _, _) in ranks:
        torch.testing.assert_close(rank_values, values)
        torch.testing.assert_close(rank_hidden_grad, hidden_grad)
    torch.testing.assert_close(torch.cat([grads[1] for _, grads in ranks]), weight_grad)
    torch.testing.assert_close(torch.cat([grads[2] for _, grads in ranks]), bias_grad)


def test_large_logits_do_not_overflow():
    hidden, weight, bias = torch.full((1, 1), 1e4), torch.tensor([[1.0], [0.5], [1.0]]), torch.zeros(3)
    ((logp,), _), _ = scored_on_threads([2, 1], hidden, weight, bias, torch.tensor([2]))
    assert logp.item() == pytest.approx(-0.693147, abs=1e-5)

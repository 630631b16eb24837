"""A head cut into blocks: the scores and gradients of plain logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.core.math import blocked_logprobs, logprobs
from miles.core.math.blocked_logprobs import linear_logprobs_in_blocks
from miles.core.math.logprobs import linear_logprobs, token_logprobs


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocked_logprobs, "_CHUNK_TOKENS", 3)
    monkeypatch.setattr(blocked_logprobs, "_BLOCK_NUMEL", 12)
    monkeypatch.setattr(blocked_logprobs, "_KEPT_NUMEL", 24)
    monkeypatch.setattr(blocked_logprobs, "_ALIGNMENT", 2)
    monkeypatch.setattr(logprobs, "_CPU_KEPT_NUMEL", 0)


def head(tokens, vocabulary, with_bias, dtype=torch.float64):
    draw = torch.Generator().manual_seed(tokens * vocabulary)
    shapes = [(tokens, 5), (vocabulary, 5), (vocabulary,)][: 3 if with_bias else 2]
    inputs = [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return inputs, torch.randint(vocabulary, (tokens,), generator=draw)


def of_blocks(inputs, target, temperature, with_entropy):
    bias = inputs[2] if len(inputs) > 2 else None
    return linear_logprobs_in_blocks(*inputs[:2], bias, target, temperature, with_entropy=with_entropy)


def weighted(scores):
    """A sum in which every score has a weight of its own."""
    columns = [column for column in scores if column is not None]
    return sum((column * torch.linspace(-1, 2 + i, len(column))).sum() for i, column in enumerate(columns))


@given(
    tokens=st.integers(1, 8),
    vocabulary=st.integers(1, 30),
    temperature=st.sampled_from([1.0, 0.6]),
    with_bias=st.booleans(),
    with_entropy=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_scores_and_gradients_are_those_of_plain_logits(tokens, vocabulary, temperature, with_bias, with_entropy):
    inputs, target = head(tokens, vocabulary, with_bias)
    mine = of_blocks(inputs, target, temperature, with_entropy)
    plain = token_logprobs(
        torch.nn.functional.linear(*inputs), target, temperature=temperature, with_entropy=with_entropy
    )
    torch.testing.assert_close(mine, tuple(plain))
    expected = torch.autograd.grad(weighted(plain), inputs)
    for _ in range(2):  # the second time without what the forward pass left behind
        torch.testing.assert_close(torch.autograd.grad(weighted(mine), inputs, retain_graph=True), expected)


@given(counts=st.lists(st.booleans(), min_size=1, max_size=8), with_entropy=st.booleans())
@settings(max_examples=30, deadline=None)
def test_tokens_without_a_gradient_are_left_out(counts, with_entropy):
    inputs, target = head(len(counts), 11, with_bias=True)
    weight_T = torch.tensor(counts, dtype=torch.float64)
    mine = of_blocks(inputs, target, 0.6, with_entropy)
    plain = token_logprobs(torch.nn.functional.linear(*inputs), target, temperature=0.6, with_entropy=with_entropy)
    of_mine, of_plain = (sum((x * weight_T).sum() for x in scores if x is not None) for scores in (mine, plain))
    torch.testing.assert_close(torch.autograd.grad(of_mine, inputs), torch.autograd.grad(of_plain, inputs))


@pytest.mark.parametrize("with_bias", [True, False])
def test_products_in_fp32_are_those_of_plain_logits(with_bias):
    inputs, target = head(7, 23, with_bias, dtype=torch.float32)
    mine = of_blocks(inputs, target, 0.6, False)
    plain = token_logprobs(torch.nn.functional.linear(*inputs), target, temperature=0.6)
    torch.testing.assert_close(mine[0], plain.logp_T)
    torch.testing.assert_close(
        torch.autograd.grad(weighted(mine), inputs), torch.autograd.grad(weighted(plain), inputs)
    )


def test_extreme_logits_stay_finite():
    (hidden, weight), target = head(4, 20, with_bias=False)
    scores = linear_logprobs_in_blocks(hidden * 1e3, weight, None, target, 1.0, with_entropy=True)
    assert all(torch.isfinite(column).all() for column in scores)


def test_half_precision_is_summed_in_fp32():
    (hidden, weight), target = head(5, 20, with_bias=False, dtype=torch.bfloat16)
    logp, _ = linear_logprobs_in_blocks(hidden, weight, None, target, 1.0, with_entropy=False)
    plain = token_logprobs(hidden.float() @ weight.float().T, target)
    torch.testing.assert_close(logp, plain.logp_T)
    logp.sum().backward()
    assert weight.grad.dtype == torch.bfloat16


def test_logits_that_do_not_fit_are_computed_in_blocks(monkeypatch):
    called = []
    monkeypatch.setattr(logprobs, "linear_logprobs_in_blocks", lambda *args, **_: called.append(1) or (args[0], None))
    (hidden, weight), target = head(4, 20, with_bias=False)
    linear_logprobs(hidden, weight, target)
    assert called
    linear_logprobs(hidden, weight, target, chunk_size=2)
    assert len(called) == 1

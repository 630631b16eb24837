"""Attention over packs of short samples: what the plain formula gives, value and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.core.training.bucket_attention import attend_by_buckets, sdpa_bucket
from miles.core.training.segments import Segments
from miles.core.training.short_attention import MAX_LENGTH

CPU = torch.device("cpu")


def pack_of(families: list[tuple[int, list[int]]]) -> Segments:
    """Samples of (prompt, responses): each prompt is there once."""
    lengths, places, count = [], [], 0
    for prompt, responses in families:
        shared = list(range(count, count + prompt))
        count += prompt
        for response in responses:
            places += [*shared, *range(count, count + response)]
            count += response
            lengths.append(prompt + response)
    return Segments(lengths, CPU, torch.tensor(places).numpy())


def one_by_one(q, k, v, segments):
    """Each sample alone, by the formula."""
    groups = q.shape[1] // k.shape[1]
    out = torch.empty(len(q), q.shape[1], v.shape[2], dtype=q.dtype)
    start = 0
    for length in segments.lengths:
        places = segments.end_to_end.token_of_cell[start : start + length]
        start += length
        scores = torch.einsum("qhd,khd->hqk", q[places], k[places].repeat_interleave(groups, 1)) * q.shape[2] ** -0.5
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out = out.index_put((places,), torch.einsum("hqk,khd->qhd", weights, v[places].repeat_interleave(groups, 1)))
    return out


@given(
    families=st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(0, 12), min_size=1, max_size=4)), min_size=1, max_size=4
    ),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    value_size=st.sampled_from([3, 5]),
)
@settings(max_examples=30, deadline=None)
def test_values_and_gradients_are_those_of_the_formula(families, heads, value_size):
    segments = pack_of(families)
    draw = torch.Generator().manual_seed(0)
    shapes = [(heads[0], 3), (heads[1], 3), (heads[1], value_size)]
    q, k, v = (
        torch.randn(segments.num_rows, *shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes
    )
    mine = attend_by_buckets(sdpa_bucket, q, k, v, segments, None, None)
    expected = one_by_one(q, k, v, segments)
    torch.testing.assert_close(mine, expected)
    weight = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((mine * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("length", "window"), [(MAX_LENGTH + 1, None), (8, 4)])
def test_long_samples_and_windows_that_cut_go_to_the_kernel(length, window):
    segments = Segments([length, 3], CPU)
    x = torch.randn(segments.num_rows, 2, 4)
    attend_by_buckets(sdpa_bucket, x, x, x, segments, None, window)
    assert not segments._short_rows


def test_tables_are_made_once_for_all_layers():
    segments = pack_of([(3, [4, 5])])
    assert segments.short_rows(4, 2) is segments.short_rows(4, 2)


def test_a_prompt_attends_once():
    rows = pack_of([(10, [6, 6, 6])]).short_rows(1, 1)
    assert [bucket.shape for bucket in rows.buckets] == [(1, 16, 16), (2, 6, 16)]

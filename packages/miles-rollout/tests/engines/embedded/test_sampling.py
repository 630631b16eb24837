import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.rollout.engines.embedded.sampling import (
    BLOCK,
    SamplingParams,
    SamplingRows,
    log_probs,
    padded_vocabulary,
    sample,
    uniform,
)

VOCABULARY = 150


def padded(logits):
    full = torch.full((logits.shape[0], padded_vocabulary(logits.shape[1])), float("-inf"))
    full[:, : logits.shape[1]] = logits
    return full


def draw(logits, params, seeds=None, positions=None):
    """Tokens and log-probs; ``params`` is one for all rows or one per row."""
    rows = logits.shape[0]
    params = params if isinstance(params, list) else [params] * rows
    seeds = np.arange(rows, dtype=np.uint64) if seeds is None else np.asarray(seeds, np.uint64)
    positions = np.zeros(rows, np.int64) if positions is None else np.asarray(positions, np.int64)
    full = padded(logits)
    return sample(full, torch.empty_like(full), SamplingRows(params, seeds), positions)


def some_logits(rows=1, seed=0, scale=2.0):
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def allowed(logits, params):
    """Tokens that may be drawn, by the definitions of top-k, top-p and min-p."""
    probs = torch.softmax(logits.double() / params.temperature, -1)
    order = probs.argsort(descending=True)
    before = probs[order].cumsum(0) - probs[order]
    keep = before < params.top_p
    if params.top_k > 0:
        keep[params.top_k :] = False
    keep &= probs[order] >= params.min_p * probs.max()
    return set(order[keep].tolist())


def test_the_distribution_is_the_softmax():
    """Stratified: with one uniform number per 1/n of the interval the counts are the probabilities up to one."""
    logits = some_logits()
    count = 4000
    tokens, _ = draw(logits.expand(count, -1), SamplingParams(), seeds=range(count))
    frequencies = torch.bincount(tokens, minlength=VOCABULARY) / count
    assert (frequencies - torch.softmax(logits[0], -1)).abs().max() < 0.02


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_log_probs_are_of_the_scaled_distribution_before_truncation(temperature):
    logits = some_logits(32)
    tokens, logps = draw(logits, SamplingParams(temperature=temperature, top_k=5, top_p=0.8))
    expected = torch.log_softmax(logits / temperature, -1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logps, expected, atol=2e-6, rtol=0)


def test_temperature_zero_and_top_k_one_take_the_most_probable():
    logits = some_logits(16)
    best = logits.argmax(-1)
    for params in (SamplingParams(temperature=0.0), SamplingParams(top_k=1, temperature=1.3)):
        assert torch.equal(draw(logits, params)[0], best)


def test_greedy_and_sampling_rows_share_a_batch():
    logits = some_logits(8)
    mixed = [SamplingParams(temperature=0.0) if row % 2 else SamplingParams() for row in range(8)]
    tokens, logps = draw(logits, mixed)
    for row in range(8):
        alone = draw(logits[row : row + 1], mixed[row], seeds=[row])
        assert (tokens[row], logps[row]) == (alone[0][0], alone[1][0])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.floats(0.2, 2.0),
    st.sampled_from([-1, 1, 2, 7, 64, 65, 149, 150, 1000]),
    st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_only_tokens_that_truncation_leaves_are_drawn(seed, temperature, top_k, top_p, min_p):
    logits = some_logits(1, seed % 1000)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    tokens, _ = draw(logits.expand(64, -1), params, seeds=range(seed, seed + 64))
    assert set(tokens.tolist()) <= allowed(logits[0], params) | {int(logits.argmax())}


def test_every_token_that_truncation_leaves_can_be_drawn():
    logits = some_logits(1, 5, scale=0.3)
    params = SamplingParams(top_k=20, top_p=0.5)
    tokens, _ = draw(logits.expand(3000, -1), params, seeds=range(3000))
    assert set(tokens.tolist()) == allowed(logits[0], params)


def test_a_flat_distribution_widens_the_candidates_until_top_p_is_reached():
    logits = torch.zeros(1, VOCABULARY) + torch.arange(VOCABULARY) * 1e-4
    params = SamplingParams(top_p=0.95)
    tokens, _ = draw(logits.expand(4000, -1), params, seeds=range(4000))
    assert set(tokens.tolist()) == allowed(logits[0], params)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**63), st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5, unique=True))
def test_impossible_tokens_are_never_drawn(seed, possible):
    logits = torch.full((1, VOCABULARY), float("-inf"))
    logits[0, possible] = 0.0
    tokens, _ = draw(logits.expand(50, -1), SamplingParams(), seeds=range(seed, seed + 50))
    assert set(tokens.tolist()) <= set(possible)


@pytest.mark.parametrize("possible", [0, BLOCK - 1, BLOCK, VOCABULARY - 1])
def test_a_certain_token_at_the_border_of_a_block(possible):
    logits = torch.full((1, VOCABULARY), -200.0)
    logits[0, possible] = 0.0
    tokens, logps = draw(logits.expand(200, -1), SamplingParams())
    assert set(tokens.tolist()) == {possible}
    assert logps.abs().max() < 1e-6


def test_log_probs_of_a_row_have_the_bits_of_sampling():
    logits = some_logits(16, scale=5.0)
    tokens, logps = draw(logits, SamplingParams())
    assert torch.equal(log_probs(padded(logits)).gather(1, tokens[:, None])[:, 0], logps)


def test_uniform_numbers_depend_on_seed_and_position_and_fill_the_interval():
    seeds, positions = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(200))
    numbers = uniform(seeds.ravel(), positions.ravel())
    assert len(np.unique(numbers)) == numbers.size
    assert 0 <= numbers.min() < 1e-3 < 1 - 1e-3 < numbers.max() < 1
    counts = np.histogram(numbers, 20, (0, 1))[0]
    assert abs(counts / numbers.size - 0.05).max() < 0.005
    neighbours = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
    assert abs(neighbours) < 0.02


def test_uniform_numbers_stay_as_they_are():
    """A run must be reproducible by later versions."""
    numbers = uniform(np.array([0, 1, 2**64 - 1], np.uint64), np.array([0, 7, 123]))
    assert numbers.tolist() == [0.28176129772258496, 0.3095866236059386, 0.6080707804670515]

import numpy as np
import pytest
import torch

from miles.rollout.engines.embedded.attention import QUERY_MULTIPLE, Plan, Segment, attend, portion_size
from miles.rollout.engines.embedded.kv import KVShape, Pool
from miles.rollout.engines.embedded.products import multiply

KEY_DIM, VALUE_DIM, NUM_SLOTS, CAPACITY = 6, 10, 3, 320


def exact(queries, keys, values, positions, *, scale, window, softcap):
    """Attention [N, Q, H, D] in float64, of every query to the first tokens of its sequence."""
    group = queries.shape[2] // keys.shape[1]
    keys, values = (torch.from_numpy(held).double().repeat_interleave(group, 1) for held in (keys, values))
    scores = torch.einsum("nqhd,nhtd->nhqt", queries.double(), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    tokens = torch.arange(keys.shape[2])
    places = torch.from_numpy(positions)[:, None, :, None]
    hidden = tokens > places
    if window is not None:
        hidden |= tokens <= places - window
    return torch.einsum("nhqt,nhtd->nqhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (5, 1), (12, 1), (2, 2)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, None), (None, 5.0)])
@pytest.mark.parametrize("positions", [[[70], [1], [299]], [list(range(256, 272))] * 2])
def test_every_query_attends_to_what_it_sees(positions, window, softcap, heads, threads):
    torch.set_num_threads(threads)
    num_heads, num_kv_heads = heads
    places = np.array(positions)
    draw = np.random.default_rng(0)
    pool = Pool(KVShape(2, num_kv_heads, KEY_DIM, VALUE_DIM), CAPACITY)
    pool.resize(NUM_SLOTS)
    pool.keys[:], pool.values[:] = draw.normal(size=pool.keys.shape), draw.normal(size=pool.values.shape)
    segment = Segment(pool, NUM_SLOTS - len(places), CAPACITY, 0, places)
    queries, keys, values = (
        torch.from_numpy(draw.normal(size=(places.size, *size)).astype(np.float32))
        for size in ((num_heads, KEY_DIM), (num_kv_heads, KEY_DIM), (num_kv_heads, VALUE_DIM))
    )
    out = torch.zeros(places.size, num_heads, VALUE_DIM)
    options = {"scale": 0.7, "window": window, "softcap": softcap}
    plan = Plan(torch.zeros(places.size), torch.from_numpy(places.reshape(-1)), [segment])
    attend(plan, 1, queries, keys, values, out, **options)
    held = pool.read(1, segment.slots, CAPACITY)
    assert (held[0][-1, :, places[-1]] == keys[-places.shape[1] :].numpy()).all(), "keys are stored first"
    wanted = exact(queries.view(*places.shape, num_heads, KEY_DIM), *held, places, **options)
    torch.testing.assert_close(out.view(wanted.shape).double(), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("group", range(1, 40))
def test_portions_hold_two_queries_or_more_and_divide_blocks(group):
    assert 2 <= portion_size(group) <= QUERY_MULTIPLE
    assert QUERY_MULTIPLE % portion_size(group) == 0


@pytest.mark.parametrize("shape", [(7, 1, 1), (1, 5, 3), (1, 1, 9)])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_whichever_axis_is_long(shape, threads):
    torch.set_num_threads(threads)
    draw = np.random.default_rng(0)
    left = draw.random((*shape, 64, 64), np.float32)
    right = draw.random((*shape[:2], 1, 64, 64), np.float32)
    out = np.zeros((*shape, 64, 64), np.float32)
    multiply(left, right, out)
    np.testing.assert_allclose(out, left @ right, rtol=1e-5)

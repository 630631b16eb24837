import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.rollout.engines.embedded.kv import KVCache, KVShape, Pool

SHAPE = KVShape(num_layers=2, num_heads=2, key_dim=3, value_dim=5)


def cache(budget=4096, context=300):
    made: KVCache[str] = KVCache(SHAPE, context, budget)
    return made


def fill(kv, pool, slot, value):
    pool.keys[:, slot] = value
    pool.values[:, slot] = value


def held(pool, slot):
    values = {*pool.keys[:, slot].flatten().tolist(), *pool.values[:, slot].flatten().tolist()}
    assert len(values) == 1
    return values.pop()


def test_slots_double_up_to_the_context():
    assert [pool.capacity for pool in cache(context=300).pools] == [64, 128, 256, 320]
    assert [pool.capacity for pool in cache(context=20).pools] == [32]


def test_the_smallest_slots_that_fit_are_chosen():
    kv = cache()
    assert [kv.pool_for(size).capacity for size in (1, 64, 65, 256, 257, 320)] == [64, 64, 128, 256, 320, 320]


def test_the_budget_holds():
    kv = cache(budget=64 * 10)
    assert kv.reserve(kv.pools[0], 10)
    assert not kv.reserve(kv.pools[0], 1)
    assert not kv.reserve(kv.pools[1], 1)
    assert kv.allocated_tokens <= 640


def test_unused_slots_give_way_and_promised_ones_do_not():
    kv = cache(budget=64 * 8)
    small, large = kv.pools[:2]
    assert kv.reserve(small, 1)
    assert small.num_slots == 8
    assert kv.reserve(large, 3)
    assert (small.num_slots, large.num_slots) == (1, 3)
    assert kv.place(small, "a") == 0


def test_what_fits_alone():
    kv = cache(budget=200)
    assert kv.fits_alone(128)
    assert not kv.fits_alone(129)
    assert not cache(budget=10**6).fits_alone(321)


def test_written_keys_and_values_are_read_back():
    kv = cache()
    pool = kv.pools[0]
    kv.reserve(pool, 2)
    draw = np.random.default_rng(0)
    keys, values = draw.random((6, 2, 3), np.float32), draw.random((6, 2, 5), np.float32)
    pool.write(1, slice(0, 2), np.array([[0, 1, 5], [0, 1, 2]]), keys, values)
    read_keys, read_values = pool.read(1, slice(1, 2), 32)
    assert read_keys.shape == (1, 2, 32, 3)
    assert (read_keys[0, :, :3] == keys[3:].swapaxes(0, 1)).all()
    assert (read_values[0, :, :3] == values[3:].swapaxes(0, 1)).all()
    assert (pool.keys[1, 0, :, 5] == keys[2]).all()
    assert not pool.keys[0].any()


def test_experts_are_read_back_by_token():
    pool = Pool(KVShape(num_layers=2, num_heads=1, key_dim=1, value_dim=1, experts_per_token=3), 64)
    pool.resize(2)
    chosen = np.arange(24).reshape(2, 4, 3)
    for layer in (0, 1):
        pool.write_experts(layer, slice(1, 2), np.arange(4)[None], chosen[layer])
    assert (pool.read_experts(1, 4) == chosen.swapaxes(0, 1)).all()


def test_growing_keeps_what_is_held():
    kv = cache()
    pool = kv.pools[0]
    kv.reserve(pool, 1)
    fill(kv, pool, kv.place(pool, "a"), 7.0)
    assert kv.reserve(pool, 30)
    assert held(pool, 0) == 7.0


def test_copying_between_pools():
    kv = cache()
    small, large = kv.pools[:2]
    kv.reserve(small, 3)
    kv.reserve(large, 2)
    for number in range(3):
        fill(kv, small, kv.place(small, str(number)), float(number + 1))
    kv.copy([(small, 2, large, 0), (small, 0, large, 1)], 64)
    assert [large.keys[0, slot, 0, 0, 0] for slot in (0, 1)] == [3.0, 1.0]
    assert not large.keys[:, :, :, 64:].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.data())
def test_release_keeps_the_others_together_with_their_contents(count, data):
    kv = cache()
    pool = kv.pools[0]
    kv.reserve(pool, count)
    for number in range(count):
        fill(kv, pool, kv.place(pool, f"{number}"), float(number))
    freed = data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True))
    moved = kv.release(pool, freed, pool.capacity)
    assert sorted(pool.owners) == sorted(f"{number}" for number in range(count) if number not in freed)
    assert [held(pool, slot) for slot in range(len(pool.owners))] == [float(owner) for owner in pool.owners]
    assert [slot for slot, owner in enumerate(pool.owners) if owner != f"{slot}"] == moved

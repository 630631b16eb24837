import gc

import pytest

from miles.rollout.collector_pause import full_collections_wait


def test_thresholds_come_back_when_the_last_block_ends():
    before = gc.get_threshold()
    evaluating, generating = full_collections_wait(), full_collections_wait()
    evaluating.__enter__()
    generating.__enter__()
    assert gc.get_threshold()[:2] == before[:2]
    assert gc.get_threshold()[2] > 1_000_000
    evaluating.__exit__(None, None, None)
    assert gc.get_threshold()[2] > 1_000_000
    generating.__exit__(None, None, None)
    assert gc.get_threshold() == before


def test_a_failure_brings_them_back():
    before = gc.get_threshold()
    with pytest.raises(ValueError, match="no"), full_collections_wait():
        raise ValueError("no")
    assert gc.get_threshold() == before

import pytest

from miles.core.config import Config
from miles.core.flags.data import Data
from miles.core.flags.optimizer import Optimizer
from miles.core.training.bins import Item
from miles.core.training.packing import Packing, plan_micro_batches
from miles.core.training.settings import cap_warning, learning_rate, packing, schedule_problems


def config(**values):
    return Config.of(train_backend="fsdp", **values)


def problems(**values):
    flags = config(**values)
    return schedule_problems(flags[Optimizer], flags[Data])


def rate(**values):
    flags = config(**values)
    return learning_rate(flags[Optimizer], flags[Data])


def test_the_token_cap_counts_only_with_dynamic_batches():
    assert packing(config(max_tokens_per_gpu=100, micro_batch_size=3)[Data]) == Packing(None, 3)
    dynamic = config(use_dynamic_batch_size=True, max_tokens_per_gpu=100, balance_data=True)
    assert packing(dynamic[Data]) == Packing(100, 1, balance=True)


@pytest.mark.parametrize(("flags", "tokens"), [({}, [400, 4]), ({"balance_data": True}, [202, 202])])
def test_the_tokens_of_ranks_are_balanced_where_that_is_asked_for(flags, tokens):
    lengths = [100, 1, 100, 1, 100, 1, 100, 1]
    items = [Item(sample, sample, 0, length) for sample, length in enumerate(lengths)]
    plan = plan_micro_batches(items, 2, packing(config(micro_batch_size=4, **flags)[Data]))
    assert [sum(lengths[i] for chosen in bins for i in chosen) for bins in plan] == tokens


def test_samples_that_may_exceed_the_cap_are_announced():
    data = config(use_dynamic_batch_size=True, max_tokens_per_gpu=100)[Data]
    assert "--max-tokens-per-gpu 100" in cap_warning(data, 60, 50)
    assert cap_warning(data, 50, 50) is None
    assert cap_warning(data, 150, 50, sharing=2) is None
    assert "100 x 2 (--context-parallel-size)" in cap_warning(data, 151, 50, sharing=2)
    assert cap_warning(data, None, 500) is None
    assert cap_warning(config(max_tokens_per_gpu=100)[Data], 60, 50) is None


def test_the_decay_ends_with_the_run():
    assert rate(num_rollout=10, rollout_batch_size=4, num_steps_per_rollout=2).decay_steps == 20
    assert rate(num_rollout=10, lr_decay_iters=7).decay_steps == 7


def test_warm_up_can_be_a_share_of_the_decay():
    assert rate(lr_decay_iters=200, lr_warmup_fraction=0.1).warmup_steps == 20


def test_a_constant_rate_needs_no_length():
    assert problems() == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"lr_decay_style": "cosine"}, "--lr-decay-style cosine needs to know where the decay ends"),
        ({"lr_warmup_fraction": 0.1}, "--lr-warmup-fraction 0.1 is a share of the decay"),
        ({"lr_warmup_fraction": 0.1, "lr_warmup_iters": 3, "num_rollout": 9}, "both set the warm-up"),
        ({"lr_decay_style": "WSD", "num_rollout": 9}, "--lr-decay-style WSD needs --lr-wsd-decay-iters"),
        ({"lr_decay_style": "linear", "lr_warmup_iters": 12, "num_rollout": 9}, "take 12 optimizer steps"),
    ],
)
def test_schedules_that_cannot_be_computed_are_named(values, expected):
    assert any(expected in problem for problem in problems(**values))

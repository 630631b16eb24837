"""Loss, gradients, metrics and weights do not depend on ranks, replicas, shares of samples or micro-batches.

Every algorithm is trained by one rank in one packing, then under each layout of ranks in another packing; the layouts
are real processes.
"""

from dataclasses import replace

import pytest
import torch

from miles.fsdp.backend import FsdpBackend

pytestmark = pytest.mark.slow

ALGORITHMS = {
    "grpo": {},
    "per token, asymmetric clip": {"calculate_per_token_loss": True, "eps_clip_high": 0.28},
    "gspo": {"advantage_estimator": "gspo", "num_steps_per_rollout": 2},
    "reinforce++": {"advantage_estimator": "reinforce_plus_plus", "normalize_advantages": True, "kl_coef": 0.1},
    "kl in the loss, entropy": {
        "use_kl_loss": True,
        "kl_loss_coef": 0.1,
        "kl_loss_type": "k3",
        "use_unbiased_kl": True,
        "entropy_coef": 0.01,
        "num_steps_per_rollout": 2,
    },
    "corrected by sequence": {
        "use_tis": True,
        "use_rs": True,
        "tis_level": "sequence",
        "rs_level": "geometric",
        "rs_upper_bound": 3.0,
        "rs_lower_bound": 0.1,
        "tis_batch_normalize": True,
    },
    "off-policy sequences masked": {"use_opsm": True, "opsm_delta": 0.01, "num_steps_per_rollout": 2},
    "reinforce++ baseline": {"advantage_estimator": "reinforce_plus_plus_baseline", "normalize_advantages": True},
    "ppo": {"advantage_estimator": "ppo", "gamma": 0.9, "lambd": 0.8, "num_steps_per_rollout": 2},
    "distillation": {"advantage_estimator": "on_policy_distillation"},
    "sft": {"loss_type": "sft_loss"},
}
LAYOUTS = {
    "data parallel": (2, {}),
    "context parallel": (2, {"context_parallel_size": 2}),
    "both": (4, {"context_parallel_size": 2, "balance_data": True}),
    "replicas of shared samples": (4, {"context_parallel_size": 2, "dp_replicate_size": 2}),
    "four ranks share": (4, {"context_parallel_size": 4}),
}
# All layouts on the algorithm with the most parts, and all algorithms on the layout with the most axes.
CASES = [(algorithm, "both") for algorithm in ALGORITHMS] + [
    ("corrected by sequence", layout) for layout in LAYOUTS if layout != "both"
]
ONE_PACKING = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 60}
ANOTHER = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 37}


def trained_on(rank, flags, rollouts):
    actor = FsdpBackend().create(flags, rank)
    reports = [actor.train(batch) for batch in rollouts]
    weights = {name: tensor.clone() for name, tensor in actor.named_weights()}
    actor.close()
    return reports, weights


@pytest.fixture(scope="module")
def alone():
    """What one rank computes, once per algorithm."""
    return {}


@pytest.mark.parametrize(("algorithm", "layout"), CASES)
def test_layouts_do_not_change_the_result(config, rollout, on_ranks, alone, algorithm, layout):
    rollouts = [with_columns(rollout(rollout_id=i)) for i in range(2)]
    common = ALGORITHMS[algorithm] | {"optimizer": "sgd", "lr": 0.3}
    if algorithm not in alone:
        flags = config(**common, **ONE_PACKING)
        (alone[algorithm],) = on_ranks(1, lambda rank: trained_on(rank, flags, rollouts))
    count, ranks = LAYOUTS[layout]
    flags = config(**common, **ANOTHER, **ranks)
    results = on_ranks(count, lambda rank: trained_on(rank, flags, rollouts))
    for reports, weights in results:
        assert_same(reports, weights, *alone[algorithm])


def assert_same(reports, weights, expected_reports, expected_weights):
    for report, expected in zip(reports, expected_reports, strict=True):
        for step, expected_step in zip(report.steps, expected.steps, strict=True):
            assert step == pytest.approx(expected_step, rel=2e-4, abs=2e-6)
        for name in (name for name in expected.metrics if name.startswith("rollout/")):
            assert report.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-4, abs=1e-5)
    assert list(weights) == list(expected_weights)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected_weights[name], atol=2e-6, rtol=2e-4)


def with_columns(batch):
    """Log-probabilities of a teacher, and values of a critic."""
    teacher = tuple(logp + 0.5 for logp in batch.rollout_log_probs)
    return replace(batch, teacher_log_probs=teacher, values=tuple(0.1 * logp for logp in batch.rollout_log_probs))


@pytest.mark.parametrize("flags", [{"attn_implementation": "eager"}, {"gradient_checkpointing": True}])
def test_shared_samples_with_every_kernel_and_recomputed_layers(config, rollout, on_ranks, flags):
    batches = [rollout()]
    both = [
        on_ranks(
            count,
            lambda rank, size=count: trained_on(rank, config(**ANOTHER, **flags, context_parallel_size=size), batches),
        )
        for count in (1, 2)
    ]
    assert_same(*both[1][0], *both[0][0])


def test_more_ranks_than_tokens_of_a_sample(config, rollout, on_ranks):
    batch = rollout(responses=[1, 1])
    size = {"rollout_batch_size": 1}
    (alone,) = on_ranks(1, lambda rank: trained_on(rank, config(**size), [batch]))
    shared, *_ = on_ranks(4, lambda rank: trained_on(rank, config(**size, context_parallel_size=4), [batch]))
    assert shared[0][0].steps[0] == pytest.approx(alone[0][0].steps[0], rel=2e-4, abs=1e-6)

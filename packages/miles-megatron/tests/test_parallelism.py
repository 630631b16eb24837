"""One rollout trained in every parallel layout, against a single process and against FSDP."""

import numpy as np
import pytest
import torch

from miles.core.protocols.backend import Rank

TP = {"tensor_model_parallel_size": 2}
SP = TP | {"sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
CP = {"context_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
ETP1 = {"expert_tensor_parallel_size": 1}
VIRTUAL = PP | {"virtual_pipeline_model_parallel_size": 2}

DENSE = {
    "dp": (2, {}),
    "tp": (2, TP),
    "tp sp": (2, SP),
    "pp": (2, PP),
    "pp virtual": (2, VIRTUAL),
    "cp": (2, CP),
    "tp pp": (4, SP | PP),
    "recomputed": (1, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
}
MIXTURE = {
    "dp": (2, {}),
    "tp sp etp": (2, SP),
    "pp": (2, PP),
    "pp virtual": (2, VIRTUAL),
    "cp": (2, CP),
    "ep": (2, EP),
    "tp pp etp": (4, SP | PP),
    "tp ep": (2, SP | EP | ETP1),
    "tp ep etp": (4, SP | EP),
}
PLAIN = {"optimizer": "sgd", "lr": 0.3}


def trained(make, config, rollouts):
    """Step metrics, rollout metrics and weights after ``rollouts``, and log-probabilities of the first one by these."""
    actor = make(config)
    reports = [actor.train(batch) for batch in rollouts]
    weights = {name: tensor.clone() for name, tensor in actor.named_weights()}
    log_probs = np.concatenate(actor.log_probs(rollouts[0]))
    return [report.steps for report in reports], [_of_rollout(report) for report in reports], weights, log_probs


def _of_rollout(report):
    return {name: value for name, value in report.metrics.items() if name.startswith("rollout/")}


def assert_equal(result, expected):
    for steps, expected_steps in zip(result[0], expected[0], strict=True):
        for step, expected_step in zip(steps, expected_steps, strict=True):
            assert step == pytest.approx(expected_step, rel=1e-4, abs=1e-6)
    for metrics, expected_metrics in zip(result[1], expected[1], strict=True):
        assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-5)
    assert result[2].keys() == expected[2].keys()
    for name, tensor in result[2].items():
        torch.testing.assert_close(tensor, expected[2][name], atol=2e-6, rtol=1e-4)
    np.testing.assert_allclose(result[3], expected[3], atol=2e-5)


_ALONE = {}


@pytest.fixture
def alone(config, rollout, on_ranks):
    """``alone(family, flag=value, ...)``: what one process comes to; computed once."""

    def run(family, **flags):
        key = (family, *sorted(flags.items()))
        if key not in _ALONE:
            rollouts = [rollout(0), rollout(1)]
            (_ALONE[key],) = on_ranks(1, lambda make: trained(make, config(family, **flags), rollouts))
        return _ALONE[key]

    return run


CASES = [*(("qwen3", name) for name in DENSE), *(("qwen3 moe", name) for name in MIXTURE)]
FAST = {("qwen3", "tp sp"), ("qwen3", "pp"), ("qwen3", "cp"), ("qwen3 moe", "ep")}


@pytest.mark.parametrize(
    ("family", "layout"), [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES]
)
def test_layouts_do_not_change_the_result(alone, config, rollout, on_ranks, family, layout):
    count, flags = (DENSE if family == "qwen3" else MIXTURE)[layout]
    results = on_ranks(count, lambda make: trained(make, config(family, **PLAIN, **flags), [rollout(0), rollout(1)]))
    assert_equal(results[0], alone(family, **PLAIN))
    assert all(result[:2] == results[0][:2] for result in results)


OTHER_FAMILIES = [
    ("glm4", 2, SP),
    ("glm4 moe", 2, SP | EP | ETP1),
    ("deepseek", 2, SP),
    ("deepseek", 2, CP),
    ("deepseek yarn", 4, SP | PP | {"num_layers_in_first_pipeline_stage": 1}),
    ("gpt oss", 2, SP | EP | ETP1),
    ("gpt oss", 2, CP),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "count", "flags"), OTHER_FAMILIES)
def test_other_families_divide_too(alone, config, rollout, on_ranks, family, count, flags):
    results = on_ranks(count, lambda make: trained(make, config(family, **PLAIN, **flags), [rollout(0), rollout(1)]))
    assert_equal(results[0], alone(family, **PLAIN))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3 tied", "qwen2"])
def test_tied_embeddings_stay_tied_over_stages(alone, config, rollout, on_ranks, family):
    results = on_ranks(2, lambda make: trained(make, config(family, **PLAIN, **PP), [rollout(0), rollout(1)]))
    assert_equal(results[0], alone(family, **PLAIN))


OBJECTIVES = {
    "two steps": {"num_steps_per_rollout": 2},
    "kl in the loss": {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k3"},
    "per token": {"calculate_per_token_loss": True},
    "entropy": {"entropy_coef": 0.01, "use_rollout_entropy": True},
    "gspo": {"advantage_estimator": "gspo"},
}


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_pipeline_of_divided_layers_trains_every_objective(alone, config, rollout, on_ranks, objective):
    flags = PLAIN | OBJECTIVES[objective]
    results = on_ranks(4, lambda make: trained(make, config("qwen3", **flags, **SP, **PP), [rollout(0), rollout(1)]))
    assert_equal(results[0], alone("qwen3", **flags))


@pytest.mark.slow
def test_adams_state_is_divided_without_a_difference(alone, config, rollout, on_ranks):
    flags = {"lr": 1e-3, "adam_eps": 1e-3}
    for divided in (True, False):
        results = on_ranks(
            2,
            lambda make, divided=divided: trained(
                make, config("qwen3", **flags, use_distributed_optimizer=divided), [rollout(0), rollout(1)]
            ),
        )
        assert_equal(results[0], alone("qwen3", **flags))


OVERLAPS = {"overlap_param_gather": True, "overlap_grad_reduce": True}


@pytest.mark.slow
def test_weights_gathered_during_the_next_pass_are_whole_where_they_are_read(config, rollout, on_ranks):
    flags = {"lr": 1e-3, "num_steps_per_rollout": 2, "use_kl_loss": True, "kl_loss_coef": 0.1}

    def run(make, how):
        actor = make(config("qwen3 moe", **flags, **how))
        steps = [step for number in range(3) for step in actor.train(rollout(number)).steps]
        return steps, {name: tensor.clone() for name, tensor in actor.named_weights()}

    expected, found = (on_ranks(2, lambda make, how=how: run(make, how))[0] for how in ({}, OVERLAPS))
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], tensor) for name, tensor in expected[1].items())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3 moe", "llama", "glm4", "glm4 moe", "deepseek"])
def test_fsdp_comes_to_the_same(alone, config, rollout, family):
    backend = pytest.importorskip("miles.fsdp.backend")
    flags = PLAIN | {"lr_decay_style": "constant"}
    fsdp = trained(
        lambda made: backend.FsdpBackend().create(made, Rank()),
        config(family, **flags, train_backend="fsdp"),
        [rollout(0), rollout(1)],
    )
    megatron = alone(family, **flags)
    for steps, fsdp_steps in zip(megatron[0], fsdp[0], strict=True):
        for step, fsdp_step in zip(steps, fsdp_steps, strict=True):
            for name in ("train/loss", "train/grad_norm", "train/ppo_kl"):
                assert step[name] == pytest.approx(fsdp_step[name], rel=1e-4, abs=1e-6)
    for name, tensor in megatron[2].items():
        torch.testing.assert_close(tensor, fsdp[2][name], atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(megatron[3], fsdp[3], atol=5e-5)

"""PPO's critic in every parallel layout, against a single process and against FSDP's."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from miles.core.protocols.backend import Rank
from miles.megatron.convert import main

PPO = {"advantage_estimator": "ppo", "n_samples_per_prompt": 2}
PLAIN = PPO | {"optimizer": "sgd", "critic_lr": 0.3}
SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "dp": (2, {}),
    "tp sp": (2, SP),
    "pp": (2, PP),
    "pp virtual": (2, PP | {"virtual_pipeline_model_parallel_size": 2}),
    "cp": (2, {"context_parallel_size": 2}),
    "tp pp": (4, SP | PP),
}
FAST = {"pp"}


def trained(critic, rollouts):
    """Values before the rollouts, metrics of every step, and the weights after all."""
    values, metrics = [], []
    for batch in rollouts:
        scored = critic.score(batch)
        values.append(np.concatenate(scored["values"]))
        metrics += critic.train(batch.having(scored)).steps
    return (
        np.concatenate(values),
        metrics,
        {name: tensor.clone() for name, tensor in critic._gatherer.named_weights(torch.float32)},
    )


def assert_equal(found, expected):
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    for metrics, expected_metrics in zip(found[1], expected[1], strict=True):
        assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=1e-6)
    assert found[2].keys() == expected[2].keys()
    for name, tensor in found[2].items():
        torch.testing.assert_close(tensor, expected[2][name], atol=2e-6, rtol=1e-4)


_ALONE = {}


@pytest.fixture
def alone(config, rollout, on_ranks):
    """``alone(family)``: what one process comes to; computed once."""

    def run(family):
        if family not in _ALONE:
            rollouts = [rollout(0), rollout(1)]
            (_ALONE[family],) = on_ranks(1, lambda make: trained(make(config(family, **PLAIN), "critic"), rollouts))
        return _ALONE[family]

    return run


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in LAYOUTS]
)
def test_layouts_do_not_change_values_and_steps(alone, config, rollout, on_ranks, layout):
    count, flags = LAYOUTS[layout]
    rollouts = [rollout(0), rollout(1)]
    results = on_ranks(count, lambda make: trained(make(config("qwen3", **PLAIN, **flags), "critic"), rollouts))
    assert_equal(results[0], alone("qwen3"))
    for other in results[1:]:
        np.testing.assert_array_equal(other[0], results[0][0])
        assert other[1] == results[0][1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "flags"), [("qwen3 tied", PP), ("qwen3 moe", {"expert_model_parallel_size": 2})], ids=["tied", "experts"]
)
def test_tied_embeddings_and_experts_are_no_exception(alone, config, rollout, on_ranks, family, flags):
    rollouts = [rollout(0), rollout(1)]
    results = on_ranks(2, lambda make: trained(make(config(family, **PLAIN, **flags), "critic"), rollouts))
    assert_equal(results[0], alone(family))


def test_fsdp_comes_to_the_same(alone, config, rollout):
    backend = pytest.importorskip("miles.fsdp.backend")
    critic = backend.FsdpBackend().create(
        config("qwen3", **PLAIN, train_backend="fsdp", lr_decay_style="linear"), Rank(), "critic"
    )
    values, metrics, weights = alone("qwen3")
    scored, found = [], []
    for batch in (rollout(0), rollout(1)):
        scored += (columns := critic.score(batch))["values"]
        found += critic.train(batch.having(columns)).steps
    np.testing.assert_allclose(np.concatenate(scored), values, atol=1e-5)
    for step, expected in zip(found, metrics, strict=True):
        assert step == pytest.approx(expected, rel=1e-4, abs=1e-6)
    parameters = {name: parameter.detach() for name, parameter in critic._model.named_parameters().items()}
    assert parameters.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, parameters[name], atol=1e-5, rtol=1e-4)
    critic.close()


def test_actor_and_critic_share_a_process(config, rollout, on_ranks):
    def run(make):
        actor, critic = make(config(**PPO)), make(config(**PPO), "critic")
        losses = []
        for number in range(3):
            batch = rollout(number)
            batch = batch.having(critic.score(batch))
            losses.append(critic.train(batch).steps[0]["train/critic-value_loss"])
            assert np.isfinite(actor.train(batch).steps[0]["train/loss"])
        return losses

    (losses,) = on_ranks(1, run)
    assert np.isfinite(losses).all()


@pytest.mark.slow
def test_resuming_is_bit_exact_and_other_layouts_resume_too(config, rollout, on_ranks, tmp_path):
    def first(make):
        critic = make(config(**PPO, **SP), "critic")
        trained(critic, [rollout(0)])
        critic.save(tmp_path)
        return trained(critic, [rollout(1)])

    def second(flags):
        def run(make):
            critic = make(config(**PPO, **flags), "critic")
            critic.load(tmp_path)
            return trained(critic, [rollout(1)])

        return run

    expected = on_ranks(2, first)[0]
    found = on_ranks(2, second(SP))[0]
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1] == expected[1]
    assert all(torch.equal(tensor, expected[2][name]) for name, tensor in found[2].items())
    found = on_ranks(2, second(PP))[0]
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)


def test_an_exported_critic_is_loaded_by_transformers_and_by_the_next_run(config, rollout, on_ranks, tmp_path):
    def export(make):
        critic = make(config(**PPO, **PP), "critic")
        trained(critic, [rollout(0)])
        critic.save_hf(tmp_path)
        return critic.score(rollout(1))["values"]

    expected = on_ranks(2, export)[0]
    assert set(load_file(tmp_path / "value_head.safetensors")) == {"weight", "bias"}
    AutoModelForCausalLM.from_pretrained(tmp_path)
    flags = PPO | SP | {"critic_load": str(tmp_path)}
    found = on_ranks(2, lambda make: make(config(**flags), "critic").score(rollout(1))["values"])[0]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=1e-5)


def test_bfloat16_critics_value_in_fp32(config, rollout, on_ranks):
    values, metrics, _ = on_ranks(
        1, lambda make: trained(make(config(**PPO, train_dtype="bf16"), "critic"), [rollout(0), rollout(1)])
    )[0]
    assert values.dtype == np.float32
    assert all(np.isfinite(step["train/critic-grad_norm"]) for step in metrics)


def test_a_converted_model_is_where_a_critic_begins(config, checkpoint, rollout, on_ranks, tmp_path):
    converted = str(tmp_path / "torch_dist")
    source = str(checkpoint())

    def scores(**flags):
        return on_ranks(2, lambda make: trained(make(config(**PPO, **SP, **flags), "critic"), [rollout(0)]))[0]

    assert on_ranks(1, lambda make: main(["to-torch-dist", "--hf-checkpoint", source, "--save", converted])) == [0]
    expected, found = scores(), scores(critic_load=converted)
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1] == expected[1]
    assert all(torch.equal(tensor, expected[2][name]) for name, tensor in found[2].items())

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from miles.core.protocols.backend import Rank
from miles.fsdp.backend import FsdpBackend


@pytest.fixture
def critic(config):
    """``critic(flag=value, ...)``: a critic of one rank."""
    made = []

    def make(rank=None, **values):
        flags = {"advantage_estimator": "ppo", "n_samples_per_prompt": 2} | values
        made.append(FsdpBackend().create(config(**flags), rank or Rank(), "critic"))
        return made[-1]

    yield make
    for each in made:
        each.close()


def plain_values(model, head, batch):
    """Values by transformers' own forward pass, one sample at a time."""
    result = []
    for tokens, length in zip(batch.tokens, batch.response_lengths, strict=True):
        hidden = model.base_model(torch.from_numpy(tokens)[None]).last_hidden_state[0]
        result.append(head(hidden)[-length - 1 : -1, 0])
    return result


def head_of(critic):
    return critic._model.module.value_head


def test_a_new_head_is_small_and_determined_by_the_seed(critic):
    weights = [head_of(critic(seed=seed)).weight.detach().clone() for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert 0.005 < weights[0].std() < 0.05


def test_one_step_is_that_of_a_plain_loop(critic, checkpoint, rollout):
    batch = rollout()
    trained = critic(clip_grad=0.1, optimizer="sgd", critic_lr=0.5)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    head = torch.nn.Linear(32, 1)
    head.load_state_dict(head_of(trained).state_dict())

    scored = trained.score(batch)
    values = plain_values(model, head, batch)
    for found, expected in zip(scored["values"], values, strict=True):
        np.testing.assert_allclose(found, expected.detach(), atol=1e-5)

    report = trained.train(batch.having(scored))
    loss = 0
    for value, mask, reward in zip(values, batch.loss_masks, batch.rewards, strict=True):
        mask = torch.from_numpy(mask)
        loss = loss + ((value - reward).square() * mask).sum() / max(mask.sum(), 1) / len(batch)
    parameters = [*model.base_model.parameters(), *head.parameters()]
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.1)
    torch.optim.SGD(parameters, lr=0.5).step()
    assert report.steps[0]["train/critic-value_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert report.steps[0]["train/critic-grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    torch.testing.assert_close(head_of(trained).weight, head.weight, atol=1e-6, rtol=1e-5)
    found, expected = dict(trained._model.named_parameters()), dict(model.named_parameters())
    assert set(found) == set(expected) | {"value_head.weight", "value_head.bias"}
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name].detach(), parameter.detach(), atol=1e-6, rtol=1e-5)


def steps_and_weights(critic, batches):
    metrics = [critic.train(batch.having(critic.score(batch))).steps[0] for batch in batches]
    tensors = {name: tensor.detach().clone() for name, tensor in critic._model.named_parameters().items()}
    return metrics, tensors


def test_two_ranks_train_like_one(config, critic, on_ranks, rollout):
    batches = [rollout(i) for i in range(2)]
    expected, weights = steps_and_weights(critic(), batches)

    def run(rank):
        flags = {"advantage_estimator": "ppo", "actor_num_gpus_per_node": 2}
        ours = FsdpBackend().create(config(**flags), rank, "critic")
        metrics, tensors = steps_and_weights(ours, batches)
        return metrics, {name: tensor.full_tensor().numpy() for name, tensor in tensors.items()}

    for metrics, tensors in on_ranks(2, run):
        for found, one in zip(metrics, expected, strict=True):
            assert found == pytest.approx(one, rel=1e-4, abs=1e-6)
        for name, tensor in tensors.items():
            np.testing.assert_allclose(tensor, weights[name], atol=2e-4, err_msg=name)


def test_a_resumed_critic_goes_on_bit_for_bit(critic, rollout, tmp_path):
    first, second = rollout(0), rollout(1)
    whole = critic()
    steps_and_weights(whole, [first])
    whole.save(tmp_path)
    expected = steps_and_weights(whole, [second])
    resumed = critic()
    resumed.load(tmp_path)
    metrics, tensors = steps_and_weights(resumed, [second])
    assert metrics == expected[0]
    assert all(torch.equal(tensor, expected[1][name]) for name, tensor in tensors.items())


def test_an_exported_critic_is_loaded_by_transformers_and_by_the_next_run(critic, rollout, tmp_path):
    trained, batch = critic(), rollout()
    steps_and_weights(trained, [batch])
    trained.save_hf(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen3"
    assert set(load_file(tmp_path / "value_head.safetensors")) == {"weight", "bias"}
    AutoModelForCausalLM.from_pretrained(tmp_path)
    again = critic(critic_load=str(tmp_path))
    for found, expected in zip(again.score(batch)["values"], trained.score(batch)["values"], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_run_that_may_be_resumed_later_starts_its_critic_from_the_model(critic, rollout, tmp_path):
    fresh, named = critic(), critic(load=str(tmp_path / "not yet"))
    for found, expected in zip(named.score(rollout())["values"], fresh.score(rollout())["values"], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_bfloat16_ranks_value_in_fp32(critic, rollout):
    trained = critic(train_dtype="bf16")
    values = trained.score(rollout())["values"]
    assert all(value.dtype == np.float32 for value in values)
    assert np.isfinite(np.concatenate(values)).all()

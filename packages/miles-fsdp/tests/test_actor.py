import importlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from miles.core.errors import TrainingError
from miles.core.math.logprobs import token_logprobs


def weights_of(actor):
    return {name: tensor.clone() for name, tensor in actor.named_weights()}


def plain_log_probs(model, batch, temperature=1.0):
    """Log-probabilities of every sample's response by transformers' own forward pass, one sample at a time."""
    result = []
    for tokens, length in zip(batch.tokens, batch.response_lengths, strict=True):
        ids = torch.from_numpy(tokens)
        logits = model(ids[None]).logits[0]
        start = len(ids) - length
        result.append(token_logprobs(logits[start - 1 : -1], ids[start:], temperature=temperature).logp_T)
    return result


def test_one_grpo_step_is_that_of_a_plain_loop(actor, checkpoint, rollout):
    batch = rollout()
    trained = actor(clip_grad=0.1, optimizer="sgd", lr=0.5)
    report = trained.train(batch)

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss = 0
    for logp, mask, reward in zip(plain_log_probs(model, batch), batch.loss_masks, batch.rewards, strict=True):
        mask = torch.from_numpy(mask)
        ratio = (logp - logp.detach()).exp()
        loss = loss - (ratio * reward * mask).sum() / max(mask.sum(), 1) / len(batch)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()

    assert report.steps[0]["train/loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert report.steps[0]["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    expected = dict(model.named_parameters())
    for name, tensor in trained.named_weights():
        torch.testing.assert_close(tensor, expected[name].detach(), atol=1e-6, rtol=1e-5)


def test_log_probs_are_those_of_the_temperature_scaled_distribution(actor, checkpoint, rollout):
    batch = rollout()
    report = actor(rollout_temperature=0.7).train(batch)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        logps = plain_log_probs(model, batch, temperature=0.7)
    means = [
        float((lp * torch.from_numpy(m)).sum() / max(m.sum(), 1)) for lp, m in zip(logps, batch.loss_masks, strict=True)
    ]
    assert report.metrics["rollout/log_probs"] == pytest.approx(np.mean(means), abs=1e-5)


COUNTING_LOSS = """
import torch
calls = []

def loss(args, batch, logits, sum_of_sample_mean):
    calls.append(len(logits))
    parts = zip(logits.split(batch["total_lengths"]), batch["response_lengths"])
    rows = torch.cat([part[-response - 1 : -1] for part, response in parts])
    return sum_of_sample_mean(rows.log_softmax(-1).square().mean(-1)), {}
"""


def test_a_custom_loss_can_be_computed_again_in_the_backward_pass(actor, rollout, tmp_path, monkeypatch):
    (tmp_path / "counting.py").write_text(COUNTING_LOSS)
    monkeypatch.syspath_prepend(tmp_path)
    flags = {"loss_type": "custom_loss", "custom_loss_function_path": "counting.loss", "micro_batch_size": 8}
    steps, counts = [], []
    for recomputes in (False, True):
        steps.append(actor(**flags, recompute_loss_function=recomputes).train(rollout()).steps)
        calls = importlib.import_module("counting").calls
        counts.append(len(calls))
        calls.clear()
    assert steps[0] == steps[1]
    assert counts == [1, 2]


MICRO_BATCHINGS = {
    "one by one": {},
    "three by three": {"micro_batch_size": 3},
    "packed": {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 60},
    "all at once": {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 10_000},
}


@pytest.mark.parametrize("per_token", [False, True])
def test_the_step_does_not_depend_on_micro_batches(actor, rollout, per_token):
    reports, weights = [], []
    for flags in MICRO_BATCHINGS.values():
        trained = actor(**flags, calculate_per_token_loss=per_token, entropy_coef=0.01)
        reports.append(trained.train(rollout()).steps[0])
        weights.append(weights_of(trained))
    for report, tensors in zip(reports[1:], weights[1:], strict=True):
        assert report == pytest.approx(reports[0], rel=1e-4, abs=1e-6)
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, weights[0][name], atol=1e-4, rtol=1e-3)


def test_several_steps_train_on_consecutive_samples_with_the_old_log_probs_of_the_first(actor, rollout):
    trained = actor(num_steps_per_rollout=2, lr=1e-3)
    report = trained.train(rollout())
    assert len(report.steps) == 2
    assert report.steps[0]["train/ppo_kl"] == 0.0
    assert report.steps[1]["train/ppo_kl"] != 0.0
    assert "log_probs" in report.timings


def test_one_step_needs_no_pass_of_its_own_for_old_log_probs(actor, rollout):
    report = actor().train(rollout())
    assert report.steps[0]["train/ppo_kl"] == 0.0
    assert "log_probs" not in report.timings


def test_supervised_fine_tuning_lowers_the_loss(actor, rollout):
    trained = actor(loss_type="sft_loss", calculate_per_token_loss=True)
    losses = [trained.train(rollout()).steps[0]["train/loss"] for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]


def test_kl_to_the_reference_grows_from_zero_and_pulls_back(actor, rollout):
    trained = actor(use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type="low_var_kl")
    reports = [trained.train(rollout()) for _ in range(3)]
    assert reports[0].steps[0]["train/kl_loss"] == pytest.approx(0.0, abs=1e-6)
    assert reports[2].steps[0]["train/kl_loss"] > 1e-4
    assert reports[0].metrics["rollout/ref_log_probs"] == pytest.approx(reports[2].metrics["rollout/ref_log_probs"])


def test_reference_follows_the_actor_at_its_interval(actor, rollout):
    trained = actor(use_kl_loss=True, kl_loss_type="k2", ref_update_interval=2)
    kls = [trained.train(rollout(rollout_id=i)).steps[0]["train/kl_loss"] for i in range(3)]
    assert kls[1] > 1e-5
    assert kls[2] == pytest.approx(0.0, abs=1e-6)


def test_kl_in_the_reward_changes_the_advantages(actor, rollout):
    flags = {"advantage_estimator": "reinforce_plus_plus_baseline", "kl_coef": 0.5, "lr": 1e-2}
    trained = actor(**flags)
    first, second = (trained.train(rollout()).metrics for _ in range(2))
    assert first["rollout/advantages"] == pytest.approx(first["rollout/rewards"], abs=1e-5)
    assert second["rollout/advantages"] != pytest.approx(second["rollout/rewards"], abs=1e-3)


ALGORITHMS = {
    "gspo": {"advantage_estimator": "gspo"},
    "dual clip": {"eps_clip_high": 0.28, "eps_clip_c": 3.0},
    "reinforce++": {"advantage_estimator": "reinforce_plus_plus", "normalize_advantages": True, "kl_coef": 0.1},
    "distillation": {"advantage_estimator": "on_policy_distillation"},
    "tis": {"use_tis": True},
    "icepop": {"use_tis": True, "custom_tis_function_path": "icepop"},
    "rejection": {"use_rs": True, "rs_level": "geometric", "rs_upper_bound": 1.5},
    "opsm": {"use_opsm": True},
    "engine's log-probs": {"use_rollout_logprobs": True},
    "unbiased kl": {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k3", "use_unbiased_kl": True},
    "entropy bonus": {"entropy_coef": 0.01},
}


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_moves_the_weights(actor, rollout, name, steps):
    batch = rollout()
    batch = replace(batch, teacher_log_probs=tuple(logp + 0.5 for logp in batch.rollout_log_probs))
    trained = actor(**ALGORITHMS[name], num_steps_per_rollout=steps, use_dynamic_batch_size=True, max_tokens_per_gpu=60)
    before = weights_of(trained)
    report = trained.train(batch)
    assert len(report.steps) == steps
    assert all(math.isfinite(value) for step in report.steps for value in step.values())
    assert all(step["train/grad_norm"] > 0 for step in report.steps)
    assert not torch.equal(weights_of(trained)["model.norm.weight"], before["model.norm.weight"])


def test_whitened_advantages_have_mean_zero_over_tokens(actor, rollout):
    batch = rollout(responses=[5] * 8)
    report = actor(normalize_advantages=True).train(batch)
    plain = actor().train(batch)
    assert abs(report.metrics["rollout/advantages"]) < abs(plain.metrics["rollout/advantages"])


def test_fully_masked_samples_and_empty_responses_train_on_nothing(actor, rollout):
    batch = rollout(responses=[0, 5, 3, 0])
    batch.loss_masks[2][:] = 0.0
    report = actor(rollout_batch_size=2).train(batch)
    assert math.isfinite(report.steps[0]["train/loss"])


def test_a_reward_that_is_not_a_number_stops_before_the_step_and_names_the_samples(actor, rollout):
    trained = actor()
    before = weights_of(trained)
    batch = rollout()
    batch = replace(batch, rewards=(math.nan, *batch.rewards[1:]))
    with pytest.raises(TrainingError, match=r"the loss is nan: rollout 0, optimizer step 0.*\[100\]"):
        trained.train(batch)
    for name, tensor in trained.named_weights():
        assert torch.equal(tensor, before[name])


def test_a_rollout_that_makes_no_whole_steps_is_an_error(actor, rollout):
    with pytest.raises(TrainingError, match="7 samples, which do not make whole steps of --global-batch-size 8"):
        actor().train(rollout(num_samples=7))


def test_dynamic_global_batch_size_takes_whatever_the_rollout_has(actor, rollout):
    report = actor(use_dynamic_global_batch_size=True, use_dynamic_batch_size=True, max_tokens_per_gpu=100).train(
        rollout(num_samples=7)
    )
    assert len(report.steps) == 1


def test_gradient_checkpointing_changes_nothing_but_memory(actor, rollout):
    plain, checkpointed = actor(), actor(gradient_checkpointing=True)
    assert plain.train(rollout()).steps == checkpointed.train(rollout()).steps


def test_same_seed_and_data_give_bit_equal_weights(actor, rollout):
    runs = []
    for _ in range(2):
        trained = actor(use_dynamic_batch_size=True, max_tokens_per_gpu=64)
        for i in range(3):
            trained.train(rollout(rollout_id=i))
        runs.append(weights_of(trained))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def mean_log_prob_loss(args, batch, logits, sum_of_sample_mean):
    """What ``--loss-type sft_loss`` computes, from logits."""
    ends = np.cumsum(batch["total_lengths"])
    chosen = []
    for ids, end, response in zip(batch["tokens"], ends, batch["response_lengths"], strict=True):
        rows = logits[end - response - 1 : end - 1].log_softmax(-1)
        chosen.append(rows.gather(1, ids[len(ids) - response :, None])[:, 0])
    loss = -sum_of_sample_mean(torch.cat(chosen))
    return loss, {"scale": loss.detach() * args.scale}


def test_a_custom_loss_gets_logits(actor, rollout, monkeypatch):
    monkeypatch.setattr(math, "custom_loss", mean_log_prob_loss, raising=False)
    batching = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 60}
    custom = actor(loss_type="custom_loss", custom_loss_function_path="math.custom_loss", scale=2.0, **batching)
    built_in = actor(loss_type="sft_loss", **batching)
    step, expected = (trained.train(rollout()).steps[0] for trained in (custom, built_in))
    assert step["train/scale"] == pytest.approx(2 * step["train/loss"])
    assert step["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
    assert step["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-4)


def test_learning_rate_follows_the_schedule(actor, rollout):
    trained = actor(lr=1.0, lr_warmup_iters=2, lr_decay_style="linear", lr_decay_iters=4)
    rates = [trained.train(rollout()).steps[0]["train/lr-pg_0"] for _ in range(5)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])


def test_sgd_moves_weights_against_the_gradient(actor, rollout):
    trained = actor(optimizer="sgd", lr=0.5, clip_grad=0)
    first = trained.train(rollout()).steps[0]["train/loss"]
    assert trained.train(rollout()).steps[0]["train/loss"] == pytest.approx(first, abs=1e-3)


def test_resetting_the_optimizer_forgets_moments(actor, rollout):
    kept, reset = actor(), actor(reset_optimizer_states=True)
    for trained in (kept, reset):
        trained.train(rollout())
        trained.train(rollout(rollout_id=1))
    assert not torch.equal(weights_of(kept)["model.norm.weight"], weights_of(reset)["model.norm.weight"])


def test_deterministic_mode_refuses_operations_without_a_fixed_order(actor, rollout):
    try:
        assert actor(deterministic_mode=True).train(rollout()).steps == actor().train(rollout()).steps
        actor(deterministic_mode=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_difference_to_the_engine_is_reported(actor, rollout):
    step = actor().train(rollout()).steps[0]
    assert step["train/train_rollout_logprob_abs_diff"] > 0.0


def test_a_teacher_in_the_trainer_answers_at_temperature_one(actor, rollout, checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
    model.save_pretrained(tmp_path / "teacher")
    batch, flags = rollout(), {"use_opd": True, "rollout_temperature": 0.7}
    report = actor(**flags, opd_type="megatron", opd_teacher_load=str(tmp_path / "teacher")).train(batch)
    with torch.no_grad():
        logps = tuple(logp.numpy() for logp in plain_log_probs(model, batch))
    expected = actor(**flags).train(batch.having({"teacher_log_probs": logps}))
    name = "rollout/teacher_log_probs"
    assert report.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-5)
    assert report.steps[0] == pytest.approx(expected.steps[0], rel=1e-4, abs=1e-6)

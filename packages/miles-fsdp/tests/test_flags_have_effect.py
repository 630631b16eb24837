"""Set a flag, and something that a user can see changes: metrics of the steps, or the weights after them.

``EFFECTS`` is a table from a flag to the settings that give it something to act on, and to the value that it changes
to.  ``tests/fast/test_effects_are_tested.py`` sees to it that every flag is here or in another test.
"""

import json

import numpy as np
import pytest

from miles.core.protocols.backend import Rank
from miles.fsdp.backend import FsdpBackend

STEPS = {"num_steps_per_rollout": 2, "lr": 5e-2}
KL = STEPS | {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k2"}
REINFORCE = {"advantage_estimator": "reinforce_plus_plus", "normalize_advantages": True}
PPO = STEPS | {"advantage_estimator": "ppo"}
CUSTOM = {"loss_type": "custom_loss", "custom_loss_function_path": "own_losses.square"}
TIS = STEPS | {"use_tis": True}
MIS = TIS | {"custom_tis_function_path": "mis"}
RS = STEPS | {"use_rs": True, "rs_lower_bound": 0.9, "rs_upper_bound": 1.1}
DECAY = {"lr_decay_style": "linear", "lr_decay_iters": 4}
WSD = {"lr_decay_style": "WSD", "lr_decay_iters": 4, "lr_wsd_decay_iters": 4}

EFFECTS = {
    "advantage_estimator": (STEPS, "gspo"),
    "loss_type": ({}, "sft_loss"),
    "custom_loss_function_path": (CUSTOM, "own_losses.cube"),
    "compute_advantages_and_returns": (CUSTOM, False),
    "critic_lr": (PPO, 1e-3),
    "critic_lr_warmup_iters": (PPO, 5),
    "value_clip": (PPO, 1e-3),
    "seed": (PPO, 7),
    "gamma": (REINFORCE, 0.5),
    "lambd": (PPO, 0.5),
    "kl_coef": (REINFORCE | STEPS, 0.5),
    "normalize_advantages": ({}, True),
    "eps_clip": (STEPS, 0.01),
    "eps_clip_high": (STEPS, 0.01),
    "eps_clip_c": (STEPS, 1.01),
    "use_kl_loss": (STEPS, True),
    "kl_loss_coef": (KL, 1.0),
    "kl_loss_type": (KL, "k1"),
    "use_unbiased_kl": (KL, True),
    "ref_update_interval": (KL, 1),
    "entropy_coef": ({}, 0.1),
    "use_rollout_entropy": ({}, True),
    "use_opd": ({}, True),
    "opd_kl_coef": ({"use_opd": True}, 0.1),
    "use_rollout_logprobs": (STEPS, True),
    "use_tis": (STEPS, True),
    "tis_clip": (TIS, 0.5),
    "tis_clip_low": (TIS, 1.5),
    "custom_tis_function_path": (TIS, "icepop"),
    "get_mismatch_metrics": ({"custom_tis_function_path": "mis"}, True),
    "tis_mode": (MIS, "mask"),
    "tis_level": (MIS, "sequence"),
    "tis_upper_bound": (MIS, 1.1),
    "tis_lower_bound": (MIS | {"tis_mode": "clip"}, 0.99),
    "tis_batch_normalize": (MIS, True),
    "use_rs": (STEPS, True),
    "rs_level": (RS, "geometric"),
    "rs_lower_bound": (RS, 0.1),
    "rs_upper_bound": (RS, 10.0),
    "rs_veto_threshold": (RS, 0.5),
    "use_opsm": (STEPS, True),
    "opsm_delta": (STEPS | {"use_opsm": True}, 100.0),
    "custom_pg_loss_reducer_function_path": ({}, "own_losses.constant_divisor"),
    "calculate_per_token_loss": ({}, True),
    "reset_optimizer_states": ({}, True),
    "optimizer": ({}, "sgd"),
    "lr": ({}, 1e-3),
    "lr_warmup_iters": ({}, 4),
    "lr_warmup_init": ({"lr_warmup_iters": 4}, 1e-3),
    "lr_warmup_fraction": ({}, 0.5),
    "warmup_ratio": ({}, 0.5),
    "lr_decay_style": ({"lr_decay_iters": 4}, "cosine"),
    "lr_decay_iters": ({"lr_decay_style": "linear"}, 4),
    "min_lr": (DECAY, 5e-3),
    "lr_wsd_decay_iters": (WSD, 2),
    "lr_wsd_decay_style": (WSD, "linear"),
    "adam_beta1": ({}, 0.5),
    "adam_beta2": ({}, 0.5),
    "adam_eps": ({}, 1e-2),
    "weight_decay": ({}, 0.1),
    "clip_grad": ({"optimizer": "sgd"}, 1e-3),
}

OWN_LOSSES = """
import torch

def square(args, batch, logits, sum_of_sample_mean):
    return logits.square().mean(), {}

def cube(args, batch, logits, sum_of_sample_mean):
    return logits.abs().pow(3).mean(), {}

def constant_divisor(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
    return lambda loss: (loss * torch.cat(loss_masks)).sum() / 7.0
"""


@pytest.fixture(autouse=True)
def _own_losses(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(OWN_LOSSES)
    monkeypatch.syspath_prepend(tmp_path)


def with_teacher(batch):
    rng = np.random.default_rng(3)
    return batch.having(
        {"teacher_log_probs": tuple(rng.normal(-4, 1, r).astype(np.float32) for r in batch.response_lengths)}
    )


def seen(settings, rollout):
    """What two rollouts of training show: metrics of steps, averages, and the weights."""
    actor = FsdpBackend().create(settings, Rank())
    critic = FsdpBackend().create(settings, Rank(), "critic") if settings.advantage_estimator == "ppo" else None
    shown = []
    for rollout_id in range(2):
        batch = with_teacher(rollout(rollout_id))
        if critic is not None:
            batch = batch.having(critic.score(batch))
            shown.append(critic.train(batch).steps)
        report = actor.train(batch)
        shown.append(report.steps)
        shown.append({name: value for name, value in report.metrics.items() if not name.startswith("perf/")})
    return shown, [float(tensor.double().abs().sum()) for _, tensor in actor.named_weights()]


@pytest.fixture(scope="module")
def without():
    """What training shows without the flag, by the settings around it."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("flag", EFFECTS)
def test_setting_the_flag_changes_what_is_seen(config, rollout, without, flag):
    context, value = EFFECTS[flag]
    key = json.dumps(context, sort_keys=True)
    if key not in without:
        without[key] = seen(config(**context), rollout)
    assert getattr(config(**context), flag) != value
    assert seen(config(**context | {flag: value}), rollout) != without[key]


@pytest.mark.slow
def test_training_is_deterministic_so_that_a_change_means_something(config, rollout):
    assert seen(config(**PPO), rollout) == seen(config(**PPO), rollout)

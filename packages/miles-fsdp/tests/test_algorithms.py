"""Every algorithm learns: a tiny model samples, is rewarded for one token, and comes to prefer it."""

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from miles.core.advantages.group_reward import GroupNormalization, normalize_group_rewards
from miles.core.protocols.backend import Rank
from miles.core.types.batch import RolloutBatch
from miles.fsdp.backend import FsdpBackend

WANTED, VOCABULARY = 7, 96
PROMPTS, PER_PROMPT, RESPONSE = 4, 8, 4
ROLLOUTS = 12

OWN_FUNCTIONS = '''
import torch

def reinforce(args, batch, logits, sum_of_sample_mean):
    """Plain policy gradient on the logits of whole samples."""
    logps, start = [], 0
    for ids, total, response in zip(batch["tokens"], batch["total_lengths"], batch["response_lengths"]):
        rows = logits[start + total - response - 1 : start + total - 1].log_softmax(-1)
        logps.append(rows.gather(1, ids[-response:, None])[:, 0])
        start += total
    loss = -sum_of_sample_mean(torch.cat(logps) * torch.cat(batch["advantages"]))
    return loss, {"mean_logp": torch.cat(logps).mean().detach()}

def constant_divisor(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
    """Dr.GRPO: sums of tokens, divided by a constant."""
    return lambda loss: (loss * torch.cat(loss_masks)).sum() / 4.0

def halved(*, args, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **others):
    """A correction that halves the loss."""
    return 0.5 * pg_loss, loss_masks, {"halved": torch.full_like(pg_loss, 0.5)}
'''

STEPS = {"num_steps_per_rollout": 2}
REFERENCE = {"kl_loss_type": "low_var_kl"}
ALGORITHMS = {
    "grpo": {},
    "grpo, several steps per rollout": STEPS,
    "dr.grpo": {
        "grpo_std_normalization": False,
        "custom_pg_loss_reducer_function_path": "own_functions.constant_divisor",
    },
    "dapo": {"eps_clip_high": 0.28, "calculate_per_token_loss": True, **STEPS},
    "dual clip": {"eps_clip_c": 3.0, **STEPS},
    "gspo": {"advantage_estimator": "gspo", "eps_clip": 0.05, **STEPS},
    "ppo": {"advantage_estimator": "ppo", "critic_lr": 2e-2, "value_clip": 0.5, "num_steps_per_rollout": 4},
    "ppo, kl in the reward": {"advantage_estimator": "ppo", "kl_coef": 0.01, **REFERENCE, **STEPS},
    "reinforce++": {"advantage_estimator": "reinforce_plus_plus", "normalize_advantages": True, "kl_coef": 0.01},
    "reinforce++ baseline": {"advantage_estimator": "reinforce_plus_plus_baseline", "normalize_advantages": True},
    "on-policy distillation": {"advantage_estimator": "on_policy_distillation"},
    "grpo and distillation": {"use_opd": True, "opd_kl_coef": 0.1},
    "kl in the loss": {"use_kl_loss": True, "kl_loss_coef": 0.01, "use_unbiased_kl": True, **REFERENCE},
    "following reference": {"use_kl_loss": True, "kl_loss_coef": 0.01, "ref_update_interval": 3, **REFERENCE},
    "entropy": {"entropy_coef": 1e-3, "use_rollout_entropy": True},
    "engine's log-probs": {"use_rollout_logprobs": True, **STEPS},
    "tis": {"use_tis": True, **STEPS},
    "icepop": {"use_tis": True, "custom_tis_function_path": "icepop", **STEPS},
    "mis with rejection": {"use_tis": True, "use_rs": True, "tis_batch_normalize": True, **STEPS},
    "mismatch metrics": {"get_mismatch_metrics": True, "custom_tis_function_path": "mis"},
    "opsm": {"use_opsm": True, **STEPS},
    "custom correction": {"use_tis": True, "custom_tis_function_path": "own_functions.halved"},
    "custom loss": {"loss_type": "custom_loss", "custom_loss_function_path": "own_functions.reinforce"},
    "fresh optimizer": {"reset_optimizer_states": True},
    "dynamic global batch size": {"use_dynamic_global_batch_size": True},
    "whitened": {"normalize_advantages": True, **STEPS},
    "adapters": {"lora_rank": 8, "lora_alpha": 32.0},
}


@pytest.fixture(autouse=True)
def _own_functions(tmp_path, monkeypatch):
    (tmp_path / "own_functions.py").write_text(OWN_FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)


@torch.no_grad()
def sample(actor, rollout_id, estimator):
    """One rollout of the policy itself, its reward the share of wanted tokens."""
    generator = torch.Generator().manual_seed(rollout_id)
    ids = torch.arange(PROMPTS).repeat_interleave(PER_PROMPT)[:, None] + torch.tensor([[11, 23, 42]])
    twin, logps = plain_model(actor), []
    for _ in range(RESPONSE):
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None].expand(len(ids), 1, -1, -1)
        logp = twin(ids, attention_mask=mask, position_ids=positions).logits[:, -1].log_softmax(-1)
        tokens = torch.multinomial(logp.exp(), 1, generator=generator)
        logps.append(logp.gather(1, tokens)[:, 0])
        ids = torch.cat([ids, tokens], dim=1)
    return to_batch(rollout_id, ids.numpy(), torch.stack(logps, dim=1).numpy(), estimator)


def plain_model(actor):
    """transformers' own model of the weights that engines get, with attention that takes a mask."""
    twin = Qwen3ForCausalLM(actor._model.module.lm.config)
    twin.config._attn_implementation = "eager"
    twin.load_state_dict(dict(actor.named_weights()), strict=False)  # a tied head comes once
    return twin


def to_batch(rollout_id, ids, logps, estimator):
    responses = ids[:, -RESPONSE:]
    raw = (responses == WANTED).mean(1)
    groups = np.repeat(np.arange(PROMPTS), PER_PROMPT).tolist()
    normalization = GroupNormalization.of(estimator, rewards_normalization=True, std_normalization=True)
    rewards = normalize_group_rewards(raw.tolist(), groups, normalization, list(range(len(ids)))).tolist()
    teacher = np.where(responses == WANTED, np.log(0.9), np.log(0.1 / (VOCABULARY - 1))).astype(np.float32)
    count = len(ids)
    return RolloutBatch(
        rollout_id=rollout_id,
        tokens=tuple(ids.astype(np.int64)),
        response_lengths=(RESPONSE,) * count,
        loss_masks=(np.ones(RESPONSE, np.float32),) * count,
        rewards=tuple(rewards),
        raw_rewards=tuple(raw.tolist()),
        truncated=(False,) * count,
        sample_indices=tuple(range(count)),
        group_indices=tuple(groups),
        rollout_log_probs=tuple(logps.astype(np.float32)),
        teacher_log_probs=tuple(teacher),
    )


class Trainer:
    """Actor and, where the algorithm has one, critic."""

    def __init__(self, settings):
        self.actor = FsdpBackend().create(settings, Rank())
        has_critic = settings.advantage_estimator == "ppo"
        self.critic = FsdpBackend().create(settings, Rank(), "critic") if has_critic else None

    def train(self, batch):
        """Reports of both."""
        if self.critic is None:
            return [self.actor.train(batch)]
        batch = batch.having(self.critic.score(batch))
        batch = batch.having(self.actor.score(batch))
        return [self.critic.train(batch), self.actor.train(batch)]

    @property
    def roles(self):
        return {"actor": self.actor} | ({} if self.critic is None else {"critic": self.critic})


FLAGS = {
    "rollout_batch_size": PROMPTS,
    "n_samples_per_prompt": PER_PROMPT,
    "lr": 1e-2,
    "use_dynamic_batch_size": True,
    "max_tokens_per_gpu": 4096,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_reward_rises(config, name):
    settings = config(**FLAGS | ALGORITHMS[name])
    trainer, rewards = Trainer(settings), []
    for rollout_id in range(ROLLOUTS):
        batch = sample(trainer.actor, rollout_id, settings.advantage_estimator)
        rewards.append(np.mean(batch.raw_rewards))
        for report in trainer.train(batch):
            assert all(np.isfinite(list(step.values())).all() for step in report.steps)
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1, rewards


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ALGORITHMS, "sft"])
def test_a_resumed_run_trains_on_bit_for_bit(config, rollout, tmp_path, name):
    algorithm = ALGORITHMS.get(name, {"loss_type": "sft_loss"})
    settings = config(lr_decay_style="cosine", async_save=True, **{"lr": 1e-2} | algorithm)
    batches = [taught(rollout(rollout_id=number)) for number in range(5)]
    uninterrupted = Trainer(settings)
    for batch in batches[:3]:
        uninterrupted.train(batch)
    for role, learner in uninterrupted.roles.items():
        (tmp_path / role).mkdir()
        learner.save(tmp_path / role)
    expected = [uninterrupted.train(batch) for batch in batches[3:]]
    resumed = Trainer(settings)
    for role, learner in uninterrupted.roles.items():
        learner.finish_save()
        resumed.roles[role].load(tmp_path / role)
    found = [resumed.train(batch) for batch in batches[3:]]
    assert [[report.steps for report in reports] for reports in found] == [
        [report.steps for report in reports] for reports in expected
    ]
    weights = dict(uninterrupted.actor.named_weights())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in resumed.actor.named_weights())


def taught(batch):
    """With log-probabilities of a teacher."""
    return batch.having({"teacher_log_probs": tuple(logp + 0.5 for logp in batch.rollout_log_probs)})

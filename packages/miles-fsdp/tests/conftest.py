"""A tiny checkpoint, rollouts to train on, and ranks: real processes, forked so that nothing is imported twice."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from miles.core.config import Config
from miles.core.protocols.backend import Rank
from miles.core.types.batch import RolloutBatch
from miles.fsdp.backend import FsdpBackend

sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "utils"))

from forked_ranks import run_on_ranks

VOCABULARY = 96
# Flags that the trainer reads and another package owns, which need not be installed here.
OF_THE_ROLLOUT_PACKAGE = {
    "rollout_temperature": 1.0,
    "rollout_max_prompt_len": None,
    "rollout_max_response_len": None,
    "use_dynamic_global_batch_size": False,
    "opd_type": "sglang",
    "opd_teacher_load": None,
}
# Forked children cannot use the parent's thread pool.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Directory of a two-layer Qwen3 with tied embeddings, and files as a tokenizer leaves them."""
    directory = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@pytest.fixture
def config(checkpoint):
    """``config(flag=value, ...)``: a run of 8 samples per rollout on the CPU."""

    def make(**values):
        defaults = {
            "train_backend": "fsdp",
            "device": "cpu",
            "hf_checkpoint": str(checkpoint),
            "rollout_batch_size": 4,
            "n_samples_per_prompt": 2,
            "lr": 1e-2,
            "num_rollout": 10,
        } | OF_THE_ROLLOUT_PACKAGE
        return Config.of(**(defaults | values))

    return make


@pytest.fixture
def actor(config):
    """``actor(flag=value, ...)``: an actor of one rank."""
    made = []

    def make(**values):
        made.append(FsdpBackend().create(config(**values), Rank()))
        return made[-1]

    yield make
    for each in made:
        each.close()


def make_rollout(rollout_id=0, num_samples=8, responses=None, seed=0):
    """Random tokens and lengths; two samples per prompt; the last response token of every third sample is masked."""
    rng = np.random.default_rng((seed, rollout_id))
    if responses is None:
        responses = rng.integers(1, 20, num_samples).tolist()
    prompts = [rng.integers(0, VOCABULARY, rng.integers(2, 9)) for _ in responses[::2]]
    masks = [np.ones(r, np.float32) for r in responses]
    for mask in masks[::3]:
        mask[-1:] = 0.0
    rewards = tuple(rng.normal(size=len(responses)).tolist())
    return RolloutBatch(
        rollout_id=rollout_id,
        tokens=tuple(
            np.concatenate([prompts[i // 2], rng.integers(0, VOCABULARY, r)]) for i, r in enumerate(responses)
        ),
        response_lengths=tuple(responses),
        loss_masks=tuple(masks),
        rewards=rewards,
        raw_rewards=rewards,
        truncated=(False,) * len(responses),
        sample_indices=tuple(100 + i for i in range(len(responses))),
        group_indices=tuple(i // 2 for i in range(len(responses))),
        rollout_log_probs=tuple(rng.normal(-4.5, 0.3, r).astype(np.float32) for r in responses),
    )


@pytest.fixture
def rollout():
    return make_rollout


@pytest.fixture
def on_ranks(tmp_path):
    """``on_ranks(count, function)``: ``function(rank)`` in ``count`` processes; their results in rank order."""
    return lambda count, function, deadline_s=120.0: run_on_ranks(count, function, tmp_path, deadline_s)

"""Tiny checkpoints, rollouts to train on, and ranks: real processes, forked so that Megatron-Core is imported once."""

import multiprocessing
import sys
from pathlib import Path

from miles.megatron import cpu

cpu.install()

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import miles.megatron.actor  # noqa: E402
import miles.megatron.critic  # noqa: E402, F401
from miles.core.config import Config  # noqa: E402
from miles.core.types.batch import RolloutBatch  # noqa: E402
from miles.megatron.backend import MegatronBackend  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "utils"))

from forked_ranks import run_on_ranks  # noqa: E402

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
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SIGMOID_EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "num_hidden_layers": 3,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
GROUPS = {"n_group": 4, "topk_group": 2}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 8.0, "original_max_position_embeddings": 16}
FAMILIES = {
    "llama": ("Llama", {"head_dim": 8}),
    "llama 3": ("Llama", {"head_dim": 8, "rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", {"head_dim": 8, "sliding_window": 6}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 8, "num_hidden_layers": 4}),
    "qwen3 tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3 moe": ("Qwen3Moe", EXPERTS | {"head_dim": 8, "num_hidden_layers": 4}),
    "qwen3 moe mixed": ("Qwen3Moe", EXPERTS | {"head_dim": 8, "norm_topk_prob": False, "mlp_only_layers": [0]}),
    "qwen3 yarn": ("Qwen3", {"head_dim": 8, "rope_parameters": YARN}),
    "glm4": ("Glm4", {"head_dim": 8, "pad_token_id": None}),
    "glm4 moe": ("Glm4Moe", SIGMOID_EXPERTS | {"head_dim": 8, "use_qk_norm": True, "attention_bias": True}),
    "deepseek": ("DeepseekV3", SIGMOID_EXPERTS | LATENT | GROUPS | {"num_key_value_heads": 4}),
    "deepseek yarn": (
        "DeepseekV3",
        SIGMOID_EXPERTS
        | LATENT
        | GROUPS
        | {"num_key_value_heads": 4, "q_lora_rank": None}
        | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
    ),
    "deepseek long": (
        "DeepseekV3",
        SIGMOID_EXPERTS | LATENT | GROUPS | {"num_key_value_heads": 4, "num_hidden_layers": 4},
    ),
    "glm4 moe long": ("Glm4Moe", SIGMOID_EXPERTS | {"head_dim": 8, "num_hidden_layers": 4}),
    "gpt oss": (
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 6, "intermediate_size": 24}
        | {"rope_parameters": YARN | {"truncate": False}},
    ),
    "gpt oss of whole blocks": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}),
}
# Forked children cannot use the parent's thread pool.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """``checkpoint(family)``: directory of a model with random weights, norms and biases too."""
    made = {}

    def make(family="qwen3"):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("checkpoint")
            name, changes = FAMILIES[family]
            config = getattr(transformers, f"{name}Config")(**SMALL | changes)
            torch.manual_seed(0)
            model = getattr(transformers, f"{name}ForCausalLM")(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(0.1 * torch.randn_like(parameter))
                for name, buffer in model.named_buffers():
                    if name.endswith("e_score_correction_bias"):
                        buffer.add_(0.1 * torch.randn_like(buffer))
            model.save_pretrained(made[family])
            (made[family] / "tokenizer_config.json").write_text("{}")
        return made[family]

    return make


@pytest.fixture
def config(checkpoint):
    """``config(family, flag=value, ...)``: a run of 8 samples per rollout on the CPU."""

    def make(family="qwen3", **values):
        defaults = {
            "train_backend": "megatron",
            "device": "cpu",
            "hf_checkpoint": str(checkpoint(family)),
            "rollout_batch_size": 4,
            "n_samples_per_prompt": 2,
            "lr": 1e-2,
            "num_rollout": 10,
            "use_dynamic_batch_size": True,
            "max_tokens_per_gpu": 64,
        } | OF_THE_ROLLOUT_PACKAGE
        return Config.of(**(defaults | values))

    return make


@pytest.fixture
def rollout():
    """``rollout(number)``: random tokens and lengths, two samples per prompt, a masked token in every third sample."""

    def make(rollout_id=0, num_samples=8):
        rng = np.random.default_rng(rollout_id)
        responses = rng.integers(1, 20, num_samples).tolist()
        prompts = [rng.integers(0, VOCABULARY, rng.integers(2, 9)) for _ in responses[::2]]
        masks = tuple(np.ones(length, np.float32) for length in responses)
        for mask in masks[::3]:
            mask[-1] = 0.0
        rewards = tuple(rng.normal(size=num_samples).tolist())
        return RolloutBatch(
            rollout_id=rollout_id,
            tokens=tuple(
                np.concatenate([prompts[i // 2], rng.integers(0, VOCABULARY, length)])
                for i, length in enumerate(responses)
            ),
            response_lengths=tuple(responses),
            loss_masks=masks,
            rewards=rewards,
            raw_rewards=rewards,
            truncated=(False,) * num_samples,
            sample_indices=tuple(range(100, 100 + num_samples)),
            group_indices=tuple(i // 2 for i in range(num_samples)),
            rollout_log_probs=tuple(rng.normal(-4.5, 0.3, length).astype(np.float32) for length in responses),
        )

    return make


@pytest.fixture
def on_ranks(tmp_path):
    """``on_ranks(count, function)``: ``function(actor's maker)`` in ``count`` processes; their results in rank order.

    The maker takes a configuration (and a role) and returns an actor, which is closed at the end.
    """

    return lambda count, function, deadline_s=120.0: run_on_ranks(count, with_maker(function), tmp_path, deadline_s)


def with_maker(function):
    """``function(actor's maker)`` as a function of the rank."""

    def run(rank):
        actors = []

        def make(config, role="actor"):
            actors.append(MegatronBackend().create(config, rank, role))
            return actors[-1]

        try:
            result = function(make)
            for actor in actors:
                actor.close()
            return result
        finally:
            for process in multiprocessing.active_children():  # writers of checkpoints
                process.terminate()

    return run

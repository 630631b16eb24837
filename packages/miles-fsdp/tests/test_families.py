"""Architectures: what trains gives the log-probabilities of transformers, and what cannot be packed is refused."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from miles.core.errors import TrainingError
from miles.core.training.micro_batch import pack, response_offsets
from miles.core.training.segments import Segments
from miles.fsdp.attention import EAGER, SDPA, VARLEN
from miles.fsdp.export import named_weights
from miles.fsdp.fused_layer import fuse_layers
from miles.fsdp.layout import Padded
from miles.fsdp.loading import decoder_layers, load_model
from miles.fsdp.policy import PolicyModule
from miles.fsdp.verification import verify_packing

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TRAINED = {
    "Llama": transformers.LlamaConfig(**COMMON),
    "Qwen2": transformers.Qwen2Config(**COMMON),
    "Mistral with a sliding window": transformers.MistralConfig(**COMMON, sliding_window=4),
    "Gemma3": transformers.Gemma3TextConfig(**COMMON, head_dim=8, sliding_window=4),
    "GPT-2": transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "Phi with a head bias": transformers.PhiConfig(**COMMON),
    "Cohere with scaled logits": transformers.CohereConfig(**COMMON),
    "Granite with divided logits": transformers.GraniteConfig(**COMMON, logits_scaling=3.0),
    "Qwen3-MoE": transformers.Qwen3MoeConfig(**COMMON, **EXPERTS, head_dim=8),
}
REFUSED = {
    "capped attention scores": (
        transformers.Gemma2Config(**COMMON, head_dim=8, final_logit_softcapping=None),
        "softcap",
    ),
    "recurrent state": (
        transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8),
        "for packed samples",
    ),
    "positions from the row": (transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4), "packed"),
}


def saved(config, directory):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("name", TRAINED)
def test_packed_attention_is_transformers_attention(name, tmp_path):
    path = saved(TRAINED[name], tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.randint(0, 96, (1, 30))
    for kernel in (SDPA, EAGER, VARLEN):  # the last one's kernel runs on accelerators; loading and proof do not
        model = load_model(path, kernel)
        fuse_layers(decoder_layers(model))  # as the trainer does on CPUs
        verify_packing(PolicyModule(model, temperature=1.0, chunk_size=None), path)
        with torch.no_grad():
            logits = model(tokens, use_cache=False, segments=Segments([30], tokens.device)).logits
            torch.testing.assert_close(logits, plain(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TRAINED)
def test_weights_are_sent_under_the_names_of_the_checkpoint(name, tmp_path):
    path = saved(TRAINED[name], tmp_path)
    sent = dict(named_weights(load_model(path, SDPA), torch.float32))
    on_disk = load_file(tmp_path / "model.safetensors")
    assert sent.keys() == on_disk.keys()
    assert all(torch.equal(sent[key], on_disk[key]) for key in sent)


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_cannot_be_packed_are_refused_at_the_start(name, tmp_path):
    config, reason = REFUSED[name]
    path = saved(config, tmp_path)
    with pytest.raises(TrainingError, match=reason):
        verify_packing(PolicyModule(load_model(path, SDPA), temperature=1.0, chunk_size=None), path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_packed_has_rows_of_its_own(name, tmp_path, rollout):
    config, _ = REFUSED[name]
    path = saved(config, tmp_path)
    module = PolicyModule(load_model(path, "eager"), temperature=1.0, chunk_size=None, layout=Padded(8))
    verify_packing(module, path)
    batch = rollout()
    logps = module(pack(batch, range(8), response_offsets(batch), torch.device("cpu")), "logprobs").logp_T
    (-logps.mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_a_checkpoint_with_missing_weights_is_refused(tmp_path):
    path = saved(TRAINED["Llama"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"lacks the weights \['model.norm.weight'\]"):
        load_model(path, SDPA)

"""Every family: transformers and Megatron-Core compute the same, and weights come back bit for bit."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from miles.core.training.micro_batch import pack, response_offsets
from miles.megatron.packed_inputs import PackedInputs

FAMILIES = [
    *("llama", "llama 3", "mistral", "qwen2", "qwen3", "qwen3 tied", "qwen3 yarn", "qwen3 moe", "qwen3 moe mixed"),
    *("glm4", "glm4 moe", "deepseek", "deepseek yarn", "gpt oss"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_is_the_model(config, checkpoint, rollout, on_ranks, tmp_path, family):
    """Its logits, its weights under their names, and its gradients under the same names."""
    batch = rollout()
    directions = torch.randn(sum(map(len, batch.tokens)), 96, generator=torch.Generator().manual_seed(1))

    def run(make):
        actor = make(config(family))
        chunk, head = actor._chunks[0], actor._blueprint.head(config(family))
        weights = {name: tensor.clone() for name, tensor in actor.named_weights()}
        inputs = PackedInputs.of(
            pack(batch, range(len(batch)), response_offsets(batch), torch.device("cpu")), actor._site.layout
        )
        logits = head(chunk, chunk(inputs), inputs, "logits")
        (logits * directions).sum().backward()
        for parameter in chunk.parameters():
            parameter.data = parameter.main_grad
        return logits.detach(), weights, dict(actor.named_weights())

    ((logits, weights, gradients),) = on_ranks(1, run)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family), attn_implementation="eager", dtype=torch.float32)
    expected = torch.cat([model(torch.from_numpy(tokens)[None]).logits[0] for tokens in batch.tokens])
    torch.testing.assert_close(logits, expected.detach(), atol=2e-5, rtol=1e-4)
    stored = load_file(checkpoint(family) / "model.safetensors")
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in stored.items())
    for name, gradient in _gradients((expected * directions).sum(), model, tmp_path).items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-3)


def _gradients(loss, model, directory):
    """By the names of a checkpoint's tensors; what has no gradient is itself."""
    loss.backward()
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    model.save_pretrained(directory / "gradients")
    return load_file(directory / "gradients" / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("qwen3 tied", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        ("qwen3 tied", {"pipeline_model_parallel_size": 2}),
        ("qwen3 moe", {"expert_model_parallel_size": 2}),
    ],
)
def test_divided_weights_are_gathered_bit_for_bit(config, checkpoint, on_ranks, family, flags):
    def run(make):
        return dict(make(config(family, **flags)).named_weights())

    gathered, elsewhere = on_ranks(2, run)
    stored = load_file(checkpoint(family) / "model.safetensors")
    assert gathered.keys() == stored.keys()
    assert all(torch.equal(gathered[name], tensor) for name, tensor in stored.items())
    assert list(elsewhere) == list(gathered)

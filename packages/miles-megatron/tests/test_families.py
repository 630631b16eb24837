"""Every family: transformers and Megatron-Core compute the same, and weights come back bit for bit."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from miles.core.training.micro_batch import pack, response_offsets
from miles.megatron.packed_inputs import PackedInputs

FAMILIES = ["llama", "llama 3", "mistral", "qwen2", "qwen3", "qwen3 tied", "qwen3 moe", "qwen3 moe mixed"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_is_the_model(config, checkpoint, rollout, on_ranks, family):
    batch = rollout()

    def run(make):
        actor = make(config(family))
        chunk, head = actor._chunks[0], actor._blueprint.head(config(family))
        inputs = PackedInputs.of(
            pack(batch, range(len(batch)), response_offsets(batch), torch.device("cpu")), actor._site.layout
        )
        with torch.no_grad():
            return head(chunk, chunk(inputs), inputs, "logits"), {n: t.clone() for n, t in actor.named_weights()}

    ((logits, weights),) = on_ranks(1, run)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family), attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        expected = torch.cat([model(torch.from_numpy(tokens)[None]).logits[0] for tokens in batch.tokens])
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    stored = load_file(checkpoint(family) / "model.safetensors")
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in stored.items())


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

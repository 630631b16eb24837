import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from miles.fsdp.backend import FsdpBackend


def test_transformers_loads_what_was_exported(actor, checkpoint, rollout, tmp_path):
    trained = actor()
    trained.train(rollout())
    trained.save_hf(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = dict(trained.named_weights())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in loaded.named_parameters())
    assert loaded.config.dtype == torch.float32
    assert (tmp_path / "tokenizer_config.json").read_text() == (checkpoint / "tokenizer_config.json").read_text()
    assert (tmp_path / "chat_template.jinja").exists()


def test_an_export_can_be_trained_further(actor, rollout, tmp_path):
    first = actor()
    first.train(rollout())
    first.save_hf(tmp_path)
    second = actor(hf_checkpoint=str(tmp_path))
    assert second.train(rollout()).steps[0]["train/loss"] == pytest.approx(
        actor(hf_checkpoint=str(tmp_path)).train(rollout()).steps[0]["train/loss"]
    )
    second.save_hf(tmp_path)


def test_two_ranks_export_what_one_does(config, rollout, on_ranks, tmp_path):
    def run(rank):
        actor = FsdpBackend().create(config(train_dtype="bf16"), rank)
        actor.save_hf(tmp_path)
        return sorted(path.name for path in tmp_path.iterdir())

    (tmp_path / "junk").mkdir()
    on_ranks(2, run)
    (tmp_path / "junk").rmdir()
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "model.layers.1.mlp.up_proj.weight" in tensors

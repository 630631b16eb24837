import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from miles.core.errors import CheckpointError, ConfigError
from miles.fsdp.backend import FsdpBackend

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "use_dynamic_batch_size": True, "max_tokens_per_gpu": 64}


def weights_of(actor):
    return {name: tensor.clone() for name, tensor in actor.named_weights()}


def saved(actor, directory):
    directory.mkdir()
    actor.save(directory)
    return directory


def test_only_adapters_are_trained_and_engines_get_them_added(actor, rollout, checkpoint):
    trained = actor(**LORA, target_modules=["q_proj", "down_proj"])
    before = weights_of(trained)
    base = dict(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).named_parameters())
    assert all(torch.equal(before[name], base[name]) for name in before)
    trained.train(rollout())
    changed = {name for name, tensor in trained.named_weights() if not torch.equal(tensor, before[name])}
    parts = ("self_attn.q_proj", "mlp.down_proj")
    assert changed == {f"model.layers.{layer}.{part}.weight" for layer in (0, 1) for part in parts}


def test_the_exported_sum_answers_as_the_trainer_does(actor, rollout, tmp_path):
    trained = actor(**LORA, loss_type="sft_loss", lr=1e-1)
    trained.train(rollout())
    trained.save_hf(tmp_path)
    merged = actor(hf_checkpoint=str(tmp_path), loss_type="sft_loss")
    step, expected = (each.train(rollout(rollout_id=1)).steps[0] for each in (merged, trained))
    assert step["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)


def test_an_adapter_goes_out_and_in_in_the_format_of_peft(actor, rollout, tmp_path):
    trained = actor(**LORA, exclude_modules=["layers.0.mlp.up_proj"])
    trained.train(rollout())
    trained.save_hf(tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"].shape == (4, 32)
    assert tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"].shape == (16, 4)
    assert not any("layers.0.mlp.up_proj" in name for name in tensors)
    again = actor(**LORA, exclude_modules=["layers.0.mlp.up_proj"], lora_adapter_path=str(tmp_path / "adapter"))
    expected = weights_of(trained)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.named_weights())


def test_engines_that_add_adapters_get_what_makes_the_sum(actor, rollout):
    trained = actor(**LORA, target_modules=["q_proj", "down_proj"])
    base = weights_of(trained)
    trained.train(rollout())
    form, tensors = trained.adapter_form(), dict(trained.named_adapters())
    assert list(tensors) == form.names()
    merged = weights_of(trained)
    for layer in form.layers:
        a, b = (tensors[f"{layer}.{part}.weight"] for part in ("lora_A", "lora_B"))
        expected = base[f"{layer}.weight"] + form.scale * (b @ a)
        torch.testing.assert_close(merged[f"{layer}.weight"], expected)


def test_resuming_adapters_is_bit_exact_and_their_checkpoint_is_small(actor, rollout, tmp_path):
    uninterrupted, first = actor(**LORA), actor(**LORA)
    for i in range(2):
        uninterrupted.train(rollout(rollout_id=i))
    first.train(rollout())
    directory = saved(first, tmp_path / "state")
    resumed = actor(**LORA)
    resumed.load(directory)
    resumed.train(rollout(rollout_id=1))
    expected = weights_of(uninterrupted)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.named_weights())
    whole = saved(actor(), tmp_path / "whole")
    sizes = [sum(file.stat().st_size for file in (each / "tensors").iterdir()) for each in (directory, whole)]
    assert sizes[0] < sizes[1]


def test_the_reference_is_the_model_without_its_adapters(actor, rollout):
    trained = actor(**LORA, use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type="k3", lr=1e-1)
    reports = [trained.train(rollout()) for _ in range(3)]
    assert reports[0].steps[0]["train/kl_loss"] == pytest.approx(0.0, abs=1e-6)
    assert reports[2].steps[0]["train/kl_loss"] > 1e-5
    assert reports[2].metrics["rollout/ref_log_probs"] == reports[0].metrics["rollout/ref_log_probs"]


def test_a_reference_that_moves_takes_the_adapters_over(actor, rollout):
    trained = actor(**LORA, use_kl_loss=True, kl_loss_type="k2", ref_update_interval=2, lr=1e-1)
    kls = [trained.train(rollout(rollout_id=i)).steps[0]["train/kl_loss"] for i in range(3)]
    assert kls[1] > 1e-6
    assert kls[2] == pytest.approx(0.0, abs=1e-6)


def test_ranks_train_adapters_like_one(config, rollout, on_ranks):
    flags = config(**LORA, optimizer="sgd", lr=0.5, gradient_checkpointing=True)

    def run(rank):
        actor = FsdpBackend().create(flags, rank)
        steps = [actor.train(rollout(rollout_id=i)).steps[0] for i in range(2)]
        return steps, weights_of(actor) | {name: tensor.clone() for name, tensor in actor.named_adapters()}

    ((alone, weights),) = on_ranks(1, run)
    (steps, sharded), _ = on_ranks(2, run)
    assert sharded.keys() == weights.keys()
    for step, expected in zip(steps, alone, strict=True):
        assert step == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for name, tensor in sharded.items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-6, rtol=1e-4)


def test_layers_that_the_model_has_not_are_an_error(actor):
    with pytest.raises(ConfigError, match=r"--target-modules w1 .* It has down_proj, gate_proj"):
        actor(**LORA, target_modules=["w1"])


def test_an_adapter_of_another_kind_is_an_error(actor, tmp_path):
    def adapter(**changes):
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8.0} | changes
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        save_file({"base_model.model.other.weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
        return str(tmp_path)

    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        actor(**LORA, lora_adapter_path=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="has rank 2 and alpha"):
        actor(**LORA, lora_adapter_path=adapter(r=2))
    with pytest.raises(CheckpointError, match="found IA3"):
        actor(**LORA, lora_adapter_path=adapter(peft_type="IA3"))
    with pytest.raises(ConfigError, match="adapts other layers"):
        actor(**LORA, lora_adapter_path=adapter())

"""Adapters in every layout, against a single process and against FSDP's, whose format they share."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from miles.core.driver.checkpoint import DriverState, publish
from miles.core.errors import CheckpointError, ConfigError
from miles.core.protocols.backend import Rank
from miles.megatron.convert import main

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "optimizer": "sgd", "lr": 0.3}
SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "dp": (2, {}),
    "tp": (2, {"tensor_model_parallel_size": 2}),
    "tp sp": (2, SP),
    "pp": (2, PP),
    "cp": (2, {"context_parallel_size": 2}),
    "tp pp recomputed": (
        4,
        SP | PP | {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
}


_FROM_FSDP = []


@pytest.fixture
def fsdp_adapter(config, rollout, tmp_path_factory):
    """``(start, steps, weights, adapter)``: an adapter that FSDP wrote, and what training from it on comes to there."""
    if not _FROM_FSDP:
        _FROM_FSDP.append(trained_by_fsdp(config, rollout, tmp_path_factory.mktemp("fsdp")))
    return _FROM_FSDP[0]


def trained_by_fsdp(config, rollout, tmp_path):
    backend = pytest.importorskip("miles.fsdp.backend")
    flags = LORA | {"train_backend": "fsdp", "lr_decay_style": "linear"}
    first = backend.FsdpBackend().create(config("qwen3", **flags), Rank())
    first.train(rollout(7))
    for name in ("first", "fsdp"):
        (tmp_path / name).mkdir()
    first.save_hf(tmp_path / "first")
    start = tmp_path / "first" / "adapter"
    actor = backend.FsdpBackend().create(config("qwen3", **flags, lora_adapter_path=str(start)), Rank())
    steps = [step for number in range(2) for step in actor.train(rollout(number)).steps]
    actor.save_hf(tmp_path / "fsdp")
    weights = {name: tensor.clone() for name, tensor in actor.named_weights()}
    return start, steps, weights, load_file(tmp_path / "fsdp/adapter/adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_an_adapter_of_fsdp_as_fsdp_does(config, rollout, on_ranks, tmp_path, fsdp_adapter, layout):
    start, steps, weights, adapter = fsdp_adapter
    count, flags = LAYOUTS[layout]
    (tmp_path / "megatron").mkdir()

    def run(make):
        actor = make(config("qwen3", **LORA, **flags, lora_adapter_path=str(start)))
        found = [step for number in range(2) for step in actor.train(rollout(number)).steps]
        actor.save_hf(tmp_path / "megatron")
        return found, {name: tensor.clone() for name, tensor in actor.named_weights()}

    found_steps, found_weights = on_ranks(count, run)[0]
    for found, expected in zip(found_steps, steps, strict=True):
        for name in ("train/loss", "train/grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(found_weights[name], tensor, atol=1e-5, rtol=1e-4)
    written = load_file(tmp_path / "megatron/adapter/adapter_model.safetensors")
    assert written.keys() == adapter.keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(written[name], tensor, atol=1e-5, rtol=1e-4)
    assert json.loads((tmp_path / "megatron/adapter/adapter_config.json").read_text())["r"] == 4


def test_a_new_adapter_changes_nothing_and_does_not_depend_on_the_layout(config, rollout, on_ranks, tmp_path):
    chosen = LORA | {"target_modules": ["q_proj", "down_proj"]}

    def run(make, flags, name):
        whole, actor = make(config(**flags)), make(config(**chosen, **flags))
        assert (actor.log_probs(rollout())[0] == whole.log_probs(rollout())[0]).all()
        actor.save_hf(tmp_path / name)
        return actor.adapter_form(), {name: tensor.clone() for name, tensor in actor.named_adapters()}

    for name in ("alone", "divided"):
        (tmp_path / name).mkdir()
    ((form, tensors),) = on_ranks(1, lambda make: run(make, {}, "alone"))
    found = on_ranks(2, lambda make: run(make, SP, "divided"))
    alone, divided = (load_file(tmp_path / n / "adapter/adapter_model.safetensors") for n in ("alone", "divided"))
    assert alone.keys() == divided.keys()
    assert {name.split(".")[-3] for name in alone} == {"q_proj", "down_proj"}
    assert all(torch.equal(divided[name], tensor) for name, tensor in alone.items())
    # What engines get that add adapters themselves.
    assert {f"base_model.model.{name}" for name in form.names()} == alone.keys()
    for other, others in found:
        assert other == form
        assert list(others) == form.names()
        assert all(torch.equal(others[name], tensor) for name, tensor in tensors.items())


@pytest.mark.slow
def test_checkpoints_hold_the_adapter_and_resume_in_other_layouts(config, rollout, on_ranks, tmp_path):
    flags = {"lora_rank": 4, "use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k2"}

    def first(make):
        actor = make(config(**flags, **SP))
        actor.train(rollout(0))
        actor.save(tmp_path)
        return actor.train(rollout(1)).steps

    def second(make, layout):
        actor = make(config(**flags, **layout))
        actor.load(tmp_path)
        return actor.train(rollout(1)).steps

    expected = on_ranks(2, first)[0]
    assert expected[0]["train/kl_loss"] > 0
    assert on_ranks(2, lambda make: second(make, SP))[0] == expected
    (elsewhere,) = on_ranks(2, lambda make: second(make, PP))[0]
    assert elsewhere == pytest.approx(expected[0], rel=1e-3, abs=1e-6)
    stored = dcp.FileSystemReader(tmp_path / "torch_dist").read_metadata().state_dict_metadata
    assert all("adapters" in name for name in stored if name.startswith(("decoder", "embedding", "output_layer")))


def test_key_value_heads_that_ranks_share_are_refused(config, on_ranks):
    def run(make):
        with pytest.raises(ConfigError, match=r"k_proj.* too few heads for 4 tensor-parallel ranks"):
            make(config(lora_rank=4, tensor_model_parallel_size=4))
        make(config(lora_rank=4, tensor_model_parallel_size=4, exclude_modules=["q_proj", "k_proj", "v_proj"]))

    on_ranks(4, run)


def test_layers_that_nobody_has_are_refused(config, on_ranks):
    def run(make):
        with pytest.raises(ConfigError, match="It has down_proj, gate_proj, k_proj"):
            make(config(lora_rank=4, target_modules=["dense_h_to_4h"]))

    on_ranks(1, run)


def test_adapters_of_another_run_are_a_reference_and_no_model(config, checkpoint, rollout, on_ranks, tmp_path, capfd):
    kl = LORA | {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k2"}

    def run(make):
        actor = make(config(**LORA))
        for number in range(2):
            with publish(tmp_path, DriverState(number, 0)) as partial:
                actor.save(partial.actor)
            actor.train(rollout(number))

    def first_step(make, **flags):
        return make(config(**kl, ref_load=str(tmp_path), **flags)).train(rollout()).steps[0]["train/kl_loss"]

    def without_adapters(make):
        with pytest.raises(CheckpointError, match="holds the adapters of a run with --lora-rank alone"):
            make(config(**kl | {"lora_rank": 0}, ref_load=str(tmp_path)))

    def converted(make):
        flags = ["--hf-checkpoint", str(checkpoint()), "--load", str(tmp_path), "--save", str(tmp_path / "hf")]
        return main(["to-hf", *flags]), (tmp_path / "hf").exists()

    on_ranks(1, run)
    before, after = (on_ranks(2, lambda make, s=step: first_step(make, **SP, ref_ckpt_step=s))[0] for step in (0, 1))
    assert before == pytest.approx(0.0, abs=1e-9)
    assert after > 1e-6
    on_ranks(1, without_adapters)
    assert on_ranks(1, converted) == [(1, False)]
    assert "holds the adapters of a run with --lora-rank alone" in capfd.readouterr().err

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from miles.core.driver.checkpoint import DriverState, publish

pytestmark = pytest.mark.slow

SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
CP = {"context_parallel_size": 2}
VIRTUAL = PP | {"virtual_pipeline_model_parallel_size": 2}
FLAGS = {
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 1,
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "kl_loss_type": "k2",
    "ref_update_interval": 2,
    "num_steps_per_rollout": 2,
}


def weights_of(actor):
    return {name: tensor.clone() for name, tensor in actor.named_weights()}


@pytest.fixture
def halves(config, rollout, on_ranks, tmp_path):
    """``halves(family, (ranks, flags), (ranks, flags))``: what two rollouts, a checkpoint and a third come to."""
    directory = tmp_path / "state"
    directory.mkdir()

    def run(family, before, after):
        def first(make):
            actor = make(config(family, **FLAGS, **before[1]))
            for number in range(2):
                actor.train(rollout(number))
            actor.save(directory)
            saved = weights_of(actor)
            return saved, actor.train(rollout(2)).steps, weights_of(actor)

        def second(make):
            actor = make(config(family, **FLAGS, **after[1]))
            actor.load(directory)
            loaded = weights_of(actor)
            return loaded, actor.train(rollout(2)).steps, weights_of(actor)

        return on_ranks(before[0], first)[0], on_ranks(after[0], second)[0]

    return run


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3", (1, {})),
        pytest.param("qwen3 tied", (2, SP), marks=pytest.mark.slow),
        pytest.param("qwen3 moe", (2, EP), marks=pytest.mark.slow),
    ],
)
def test_resuming_is_bit_exact(halves, family, layout):
    (saved, steps, weights), (loaded, resumed_steps, resumed) = halves(family, layout, layout)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    assert resumed_steps == steps
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "before", "after"),
    [
        ("qwen3", (2, SP), (1, {})),
        ("qwen3 tied", (1, {}), (2, PP)),
        ("qwen3", (2, PP), (2, {})),
        ("qwen3", (2, {}), (4, SP | PP)),
        ("qwen3", (2, VIRTUAL), (2, CP)),
        ("qwen3 moe", (2, {}), (2, SP)),
        ("qwen3 moe", (2, SP), (2, PP)),
    ],
)
def test_a_checkpoint_loads_in_another_layout(halves, family, before, after):
    (saved, steps, weights), (loaded, resumed_steps, resumed) = halves(family, before, after)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    for step, resumed_step in zip(steps, resumed_steps, strict=True):
        assert resumed_step == pytest.approx(step, rel=1e-3, abs=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(resumed[name], tensor, atol=2e-3, rtol=1e-2)


@pytest.mark.slow
def test_weights_of_experts_move_between_layouts(config, rollout, on_ranks, tmp_path):
    flags = {"no_save_optim": True}

    def save(make):
        actor = make(config("qwen3 moe", **flags, **EP))
        actor.train(rollout())
        actor.save(tmp_path)
        return weights_of(actor)

    def load(make, layout):
        actor = make(config("qwen3 moe", **flags, **layout))
        actor.load(tmp_path)
        return weights_of(actor), actor.train(rollout(1)).steps

    saved = on_ranks(2, save)[0]
    for count, layout in ((1, {}), (2, SP), (2, SP | EP | {"expert_tensor_parallel_size": 1})):
        loaded, steps = on_ranks(count, lambda make, layout=layout: load(make, layout))[0]
        assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
        assert len(steps) == 1


@pytest.mark.slow
def test_experts_optimizers_do_not_move_between_layouts_and_the_error_says_so(config, rollout, on_ranks, tmp_path):
    def save(make):
        actor = make(config("qwen3 moe", **EP))
        actor.train(rollout())
        actor.save(tmp_path)

    def load(make):
        with pytest.raises(Exception, match="--expert-model-parallel-size") as caught:
            make(config("qwen3 moe")).load(tmp_path)
        return type(caught.value).__name__

    on_ranks(2, save)
    assert on_ranks(1, load) == ["CheckpointError"]


def test_a_fresh_actor_can_be_saved_and_loaded(config, rollout, on_ranks, tmp_path):
    def save(make):
        actor = make(config())
        actor.save(tmp_path)
        return actor.train(rollout()).steps

    def load(make):
        actor = make(config())
        actor.train(rollout(1))
        actor.load(tmp_path)
        return actor.train(rollout()).steps

    expected = on_ranks(1, save)
    assert on_ranks(1, load) == expected


@pytest.mark.slow
def test_what_is_written_beside_training_is_the_state_at_its_beginning(config, rollout, on_ranks, tmp_path):
    flags = FLAGS | {"keep_old_actor": True} | SP
    at_once, beside = tmp_path / "at once", tmp_path / "beside"

    def first(make, directory, **further):
        directory.mkdir(exist_ok=True)
        actor = make(config(**flags, **further))
        actor.keep_weights(0)
        actor.train(_made_by(rollout(0), 0))
        actor.keep_weights(1)
        actor.save(directory)
        steps = actor.train(_made_by(rollout(1), 0)).steps
        actor.finish_save()
        return steps

    def second(make, directory):
        actor = make(config(**flags))
        actor.load(directory)
        actor.keep_weights(1)
        return actor.train(_made_by(rollout(1), 0)).steps

    expected = on_ranks(2, lambda make: first(make, at_once))[0]
    assert on_ranks(2, lambda make: first(make, beside, async_save=True))[0] == expected
    assert on_ranks(2, lambda make: second(make, at_once))[0] == expected
    assert on_ranks(2, lambda make: second(make, beside))[0] == expected


def _made_by(batch, version):
    return batch.having({"weight_versions": tuple(np.full(r, version) for r in batch.response_lengths)})


def test_a_checkpoint_of_another_run_is_a_reference(config, rollout, on_ranks, tmp_path):
    kl = {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k2"}

    def run(make):
        actor = make(config(**kl))
        for number in range(2):
            with publish(tmp_path, DriverState(number, 0)) as partial:
                actor.save(partial.actor)
            actor.train(rollout(number))

    def kl_of_first_step(**flags):
        def first_step(make):
            return make(config(**kl, **flags)).train(rollout()).steps[0]["train/kl_loss"]

        return on_ranks(2, first_step)[0]

    on_ranks(1, run)
    run_directory = SP | {"ref_load": str(tmp_path)}
    assert kl_of_first_step(**run_directory, ref_ckpt_step=0) == pytest.approx(0.0, abs=1e-6)
    assert kl_of_first_step(**run_directory) > 1e-3


def test_transformers_loads_what_was_exported(config, checkpoint, rollout, on_ranks, tmp_path):
    def run(make):
        actor = make(config("qwen3 moe", **SP))
        actor.train(rollout())
        actor.save_hf(tmp_path)
        return weights_of(actor)

    weights, _ = on_ranks(2, run)
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in weights.items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.dtype == torch.float32
    assert (tmp_path / "tokenizer_config.json").exists()

import json

import pytest
import torch

from miles.core.driver.checkpoint import DriverState, publish
from miles.core.errors import CheckpointError
from miles.fsdp.backend import FsdpBackend

pytestmark = pytest.mark.slow


def weights_of(actor):
    return {name: tensor.clone() for name, tensor in actor.named_weights()}


def saved(actor, directory):
    directory.mkdir()
    actor.save(directory)
    return directory


FLAGS = {
    "use_dynamic_batch_size": True,
    "max_tokens_per_gpu": 64,
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 1,
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "kl_loss_type": "k2",
    "ref_update_interval": 3,
    "num_steps_per_rollout": 2,
}


def test_resuming_is_bit_exact(actor, rollout, tmp_path):
    uninterrupted = actor(**FLAGS)
    reports = [uninterrupted.train(rollout(rollout_id=i)) for i in range(5)]

    first = actor(**FLAGS)
    for i in range(3):
        first.train(rollout(rollout_id=i))
    second = actor(**FLAGS)
    second.load(saved(first, tmp_path / "state"))
    resumed = [second.train(rollout(rollout_id=i)) for i in (3, 4)]

    assert [report.steps for report in resumed] == [report.steps for report in reports[3:]]
    expected = weights_of(uninterrupted)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.named_weights())


def test_the_schedule_can_come_from_the_checkpoint(actor, rollout, tmp_path):
    state = saved(actor(lr=0.5), tmp_path / "state")
    rates = []
    for from_checkpoint in (False, True):
        resumed = actor(lr=0.25, use_checkpoint_lr_scheduler=from_checkpoint)
        resumed.load(state)
        rates.append(resumed.train(rollout()).steps[0]["train/lr-pg_0"])
    assert rates == [0.25, 0.5]


@pytest.mark.parametrize(
    ("flags", "warns"),
    [
        ({}, False),
        ({"lr": 0.25}, True),
        ({"lr": 0.25, "override_lr_scheduler": True}, False),
        ({"num_rollout": 9}, False),
    ],
)
def test_another_schedule_than_the_checkpoints_is_told_unless_it_is_meant(actor, tmp_path, caplog, flags, warns):
    state = saved(actor(lr=0.5), tmp_path / "state")
    actor(**{"lr": 0.5} | flags).load(state)
    assert ("no longer that of the checkpoint" in caplog.text) == warns


def test_saving_does_not_change_what_follows(actor, rollout, tmp_path):
    quiet, saving = actor(), actor()
    for i in range(2):
        quiet.train(rollout(rollout_id=i))
        saving.train(rollout(rollout_id=i))
        saved(saving, tmp_path / f"state-{i}")
    expected = weights_of(quiet)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saving.named_weights())


def test_a_fresh_actor_can_be_saved_and_loaded(actor, rollout, tmp_path):
    fresh = actor()
    loaded = actor()
    loaded.train(rollout())
    loaded.load(saved(fresh, tmp_path / "state"))
    assert loaded.train(rollout()).steps == fresh.train(rollout()).steps


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_checkpoint_loads_on_another_number_of_ranks(config, rollout, on_ranks, tmp_path, before, after):
    flags = config(**FLAGS)
    directory = tmp_path / "state"
    directory.mkdir()

    def first_half(rank):
        actor = FsdpBackend().create(flags, rank)
        for i in range(3):
            actor.train(rollout(rollout_id=i))
        actor.save(directory)
        return weights_of(actor)

    def second_half(rank):
        actor = FsdpBackend().create(flags, rank)
        actor.load(directory)
        loaded = weights_of(actor)
        return loaded, actor.train(rollout(rollout_id=3)).steps, weights_of(actor)

    def uninterrupted(rank):
        actor = FsdpBackend().create(flags, rank)
        reports = [actor.train(rollout(rollout_id=i)) for i in range(4)]
        return reports[3].steps, weights_of(actor)

    written = on_ranks(before, first_half)[0]
    loaded, steps, weights = on_ranks(after, second_half)[0]
    expected_steps, expected = on_ranks(1, uninterrupted)[0]
    assert all(torch.equal(loaded[name], written[name]) for name in written)
    for step, expected_step in zip(steps, expected_steps, strict=True):
        assert step == pytest.approx(expected_step, rel=1e-3, abs=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-3, rtol=1e-2)


def test_no_pickle_but_the_index_of_the_tensors(actor, rollout, tmp_path):
    trained = actor()
    trained.train(rollout())
    directory = saved(trained, tmp_path / "state")
    files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    assert files == ["rng-0.safetensors", "state.json", "tensors/.metadata", "tensors/__0_0.distcp"]
    assert json.loads((directory / "state.json").read_text())["steps_done"] == 1


def test_optimizer_state_can_be_left_out_and_then_is_not_missed_silently(actor, rollout, tmp_path):
    small = actor(no_save_optim=True)
    small.train(rollout())
    directory = saved(small, tmp_path / "state")
    with pytest.raises(CheckpointError, match="--no-save-optim"):
        actor().load(directory)
    loaded = actor(no_save_optim=True)
    loaded.load(directory)
    assert torch.equal(weights_of(loaded)["model.norm.weight"], weights_of(small)["model.norm.weight"])


def test_an_unreadable_checkpoint_names_the_file(actor, tmp_path):
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        actor().load(tmp_path)


def test_a_torn_checkpoint_is_an_error(actor, rollout, tmp_path):
    trained = actor()
    directory = saved(trained, tmp_path / "state")
    (directory / "tensors" / "__0_0.distcp").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="tensors cannot be read"):
        actor().load(directory)


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_written_beside_training_is_the_state_at_its_beginning(config, rollout, on_ranks, tmp_path, count):
    flags = config(**FLAGS, async_save=True)
    directory = tmp_path / "state"
    directory.mkdir()

    def run(rank):
        actor = FsdpBackend().create(flags, rank)
        actor.train(rollout())
        actor.save(directory)
        expected = weights_of(actor)
        actor.train(rollout(rollout_id=1))
        actor.finish_save()
        steps = actor.train(rollout(rollout_id=2)).steps
        actor.close()
        return expected, steps

    def resumed(rank):
        actor = FsdpBackend().create(flags, rank)
        actor.load(directory)
        loaded = weights_of(actor)
        actor.train(rollout(rollout_id=1))
        return loaded, actor.train(rollout(rollout_id=2)).steps

    expected, steps = on_ranks(count, run)[0]
    loaded, steps_again = on_ranks(count, resumed)[0]
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert steps_again == steps


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 4}], ids=["whole", "lora"])
def test_a_checkpoint_of_another_run_is_a_reference(actor, rollout, tmp_path, lora):
    kl = {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k2"} | lora
    other = actor(**kl)
    for number in range(2):
        with publish(tmp_path, DriverState(number, 0)) as partial:
            other.save(partial.actor)
        other.train(rollout(number))
    newest, first = (
        actor(**kl, ref_load=str(tmp_path), ref_ckpt_step=step).train(rollout()).steps[0]["train/kl_loss"]
        for step in (None, 0)
    )
    assert first == pytest.approx(0.0, abs=1e-6)
    assert newest > 1e-3

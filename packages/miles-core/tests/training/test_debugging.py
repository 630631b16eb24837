"""Profiles, memory, dumps and checks, through whole trainers over tables."""

import gzip
import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from table_models import TableModel, make_batch, make_critic, make_trainer

from miles.core.errors import DataError, TrainingError
from miles.core.training import ci
from miles.core.training.train_data import read_train_data


def train(*, batch=None, model=None, reference=None, **flags):
    return make_trainer(model, reference, **flags).train(batch or make_batch())


def test_what_was_trained_on_is_written_sample_by_sample(tmp_path):
    pattern = str(tmp_path / "{rollout_id}" / "{rank}.safetensors")
    batch = make_batch()
    report = train(batch=batch, save_debug_train_data=pattern, use_rollout_entropy=True, num_steps_per_rollout=2)
    data = read_train_data(tmp_path / "3" / "0.safetensors")
    assert data.header["rollout_id"] == 3
    assert data.header["sample_indices"] == list(batch.sample_indices)
    assert [tokens.tolist() for tokens in data.columns["tokens"]] == [tokens.tolist() for tokens in batch.tokens]
    assert {"log_probs", "entropy", "advantages", "returns", "loss_masks"} < set(data.columns)
    means = [float(column.mean()) for column in data.columns["log_probs"]]
    assert np.mean(means) == pytest.approx(report.metrics["rollout/log_probs"], abs=1e-6)


def test_a_file_of_something_else_is_not_train_data(tmp_path):
    save_file({"tokens": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="not version 1 of miles-train-data"):
        read_train_data(tmp_path / "other.safetensors")


def trace_events(path):
    return {event["name"] for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}


def test_rollouts_are_profiled_between_start_and_end(tmp_path):
    flags = {"use_pytorch_profiler": True, "profile_dir": str(tmp_path), "profile_step_start": 3, "profile_step_end": 4}
    trainer = make_trainer(**flags, num_steps_per_rollout=2)
    for rollout_id in (2, 3, 4):
        trainer.train(make_batch(rollout_id=rollout_id))
    (trace,) = tmp_path.iterdir()
    assert trace.name == "train_overall-0000003-rank0.json.gz"
    assert {"train_log_probs", "train_actor"} < trace_events(trace)


def test_parts_are_profiled_apart(tmp_path):
    targets = ["train_actor", "train_log_probs"]
    train(use_pytorch_profiler=True, profile_dir=str(tmp_path), profile_step_start=0, profile_target=targets)
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == targets


@pytest.mark.skipif(sys.platform != "linux", reason="memray's traces are made here on Linux only")
def test_memray_records_the_rollouts_that_were_asked_for(tmp_path):
    memray = pytest.importorskip("memray")
    trainer = make_trainer(
        record_memory_history=True,
        memory_recorder="memray",
        memory_snapshot_dir=str(tmp_path),
        memory_snapshot_path="trace.bin",
        memory_snapshot_num_steps=1,
    )
    trainer.train(make_batch())
    assert memray.FileReader(tmp_path / "rank0_trace.bin").metadata.total_allocations > 0
    trainer.train(make_batch())


def test_a_hook_sees_the_rollout_before_training_and_may_change_advantages(tmp_path, monkeypatch):
    (tmp_path / "my_postprocess.py").write_text("def keep(args, data):\n    data['advantages'][0].zero_()\n")
    monkeypatch.syspath_prepend(tmp_path)
    plain = train().metrics["rollout/advantages"]
    changed = train(rollout_data_postprocess_path="my_postprocess.keep").metrics["rollout/advantages"]
    assert changed == pytest.approx(plain - make_batch().rewards[0] / 8)


def engine_says(batch, logp):
    return batch.having({"rollout_log_probs": tuple(np.full(r, logp, np.float32) for r in batch.response_lengths)})


def test_a_healthy_run_passes_its_checks():
    train(reference=TableModel(), use_kl_loss=True, ci_test=True, num_steps_per_rollout=2)


def test_an_engine_that_disagrees_fails_the_check():
    with pytest.raises(TrainingError, match=r"--ci-test: rollout 3: .* in the trainer and -9 in the engine"):
        train(batch=engine_says(make_batch(), -9.0), ci_test=True)


def test_a_reference_that_differs_before_training_fails_the_check():
    batch = make_batch(rollout_id=0)
    flags = {"use_kl_loss": True, "kl_loss_type": "low_var_kl", "ci_test": True, "num_steps_per_rollout": 2}
    with pytest.raises(TrainingError, match="in its reference"):
        train(batch=batch, reference=TableModel(seed=1), **flags)


@pytest.mark.parametrize(
    ("step", "first_of_run"),
    [({"train/ppo_kl": 1e-3}, False), ({"train/pg_clipfrac": 0.1}, False), ({"train/kl_loss": 1e-3}, True)],
)
def test_a_first_step_that_is_not_on_policy_fails_the_check(step, first_of_run):
    ci.check_first_step(0, first_of_run, {"train/ppo_kl": 0.0})
    with pytest.raises(TrainingError, match="--ci-test"):
        ci.check_first_step(0, first_of_run, step)


def test_gradient_norms_are_compared_with_those_of_another_run(tmp_path):
    pattern = str(tmp_path / "{role}-{rollout_id}-{step_id}.json")
    train(ci_save_grad_norm=pattern, num_steps_per_rollout=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["actor-3-0.json", "actor-3-1.json"]
    train(ci_load_grad_norm=pattern, num_steps_per_rollout=2)
    with pytest.raises(TrainingError, match="--ci-load-grad-norm: the norm of the gradient is"):
        train(ci_load_grad_norm=pattern, num_steps_per_rollout=2, model=TableModel(seed=5))
    batch, critic = make_batch(), make_critic(ci_save_grad_norm=pattern)
    critic.train(batch.having(critic.score(batch)))
    assert (tmp_path / "critic-3-0.json").is_file()

import pytest

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from miles.core.flags.logging import Logging
from miles.core.tracking.jsonl import JsonlTracker
from miles.core.tracking.tensorboard import TensorboardTracker, log_folder

CONFIG = {Logging: Logging(use_tensorboard=True)}


def curve(run_dir, name):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_curves_of_a_continued_run_hold_every_step_once(tmp_path):
    first = TensorboardTracker(CONFIG, tmp_path)
    for step in range(3):
        first.log({"train/loss": step + 0.5}, step=step, kind="train", rollout_id=step)
    first.close()
    journal = JsonlTracker(None, tmp_path)  # the checkpoint knows of one step only
    journal.log({"train/loss": 0.5}, step=0, kind="train", rollout_id=0)
    journal.close()

    second = TensorboardTracker(CONFIG, tmp_path)
    second.log({"train/loss": 7.5}, step=1, kind="train", rollout_id=1)
    second.close()
    assert curve(tmp_path, "train/loss") == [(0, 0.5), (1, 7.5)]


def test_flags_choose_the_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_DIR", raising=False)
    flags = Logging(tensorboard_dir="/logs", tb_project_name="gsm8k", tb_experiment_name="first")
    assert str(log_folder(flags, tmp_path)) == "/logs/gsm8k/first"
    assert log_folder(Logging(), tmp_path) == tmp_path / "tensorboard"
    monkeypatch.setenv("TENSORBOARD_DIR", "/everyone")
    assert str(log_folder(Logging(), tmp_path)) == "/everyone"

import pytest

pytest.importorskip("wandb")

from miles.core.errors import ConfigError
from miles.core.flags.logging import Logging
from miles.core.tracking.wandb import WandbTracker, remembered_id


class Config:
    wandb_run_name = None
    rollout_batch_size, n_samples_per_prompt, global_batch_size = 8, 4, 16

    def __init__(self, **flags):
        self.flags = Logging(use_wandb=True, wandb_mode="offline", wandb_project="miles-test", **flags)

    def __getitem__(self, group):
        return self.flags


def logged(tracker):
    """Copies of what reaches the W&B run."""
    events = []
    log = tracker._run.log
    tracker._run.log = lambda data: (events.append(data), log(data))
    return events


def test_an_offline_run_is_written_below_the_run_directory(tmp_path):
    tracker = WandbTracker(Config(), tmp_path)
    events = logged(tracker)
    tracker.log({"rollout/raw_reward": 0.5}, step=3, kind="rollout", rollout_id=3)
    tracker.log({"train/loss": 0.5}, step=7, kind="train", rollout_id=3)
    tracker.close()
    assert events == [{"rollout/step": 3, "rollout/raw_reward": 0.5}, {"train/step": 7, "train/loss": 0.5}]
    assert list(tmp_path.glob(f"wandb/offline-run-*/run-{remembered_id(tmp_path)}.wandb"))


def test_missing_key_is_a_mistake_of_the_configuration(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = Config()
    config.flags = config.flags.model_copy(update={"wandb_mode": "online"})
    with pytest.raises(ConfigError, match=r"--use-wandb: .*key"):
        WandbTracker(config, tmp_path)


def test_a_continued_run_keeps_its_id(tmp_path):
    assert remembered_id(tmp_path) == remembered_id(tmp_path)


def test_every_axis_can_count_optimizer_steps(tmp_path):
    tracker = WandbTracker(Config(wandb_always_use_train_step=True), tmp_path)
    events = logged(tracker)
    tracker.log({"eval/add": 0.5}, step=3, kind="eval", rollout_id=3)
    tracker.close()
    assert events == [{"eval/step": 6, "eval/add": 0.5}]

"""Actor and critic driven as one, over roles that write down what they are asked."""

import numpy as np
import pytest

from miles.core.config import Config
from miles.core.driver import checkpoint
from miles.core.driver.actor_critic import ActorCritic, assemble
from miles.core.protocols.backend import TrainReport
from miles.core.types.batch import RolloutBatch


class Role:
    def __init__(self, name, log, columns):
        self.name, self.log, self.columns = name, log, columns

    def start(self):
        self.log.append((self.name, "start"))

    def score(self, batch):
        self.log.append((self.name, "score"))
        return self.columns

    def begin_train(self, batch):
        self.log.append((self.name, "begin", batch.values is not None, batch.log_probs is not None))
        report = TrainReport({f"rollout/{self.name}": 1.0}, ({f"train/{self.name}": 2.0},), {self.name: 3.0})
        return lambda: report

    def offload(self):
        self.log.append((self.name, "offload"))
        return 3

    def onload(self):
        self.log.append((self.name, "onload"))

    def save(self, directory):
        (directory / "state").write_text(self.name)

    def finish_save(self):
        self.log.append((self.name, "finished"))

    def save_hf(self, directory):
        (directory / "weights").write_text(self.name)

    def load(self, directory):
        self.log.append((self.name, "load", (directory / "state").read_text()))

    def close(self):
        self.log.append((self.name, "close"))


def make_batch(rollout_id=0):
    column = (np.zeros(1, np.float32),)
    return RolloutBatch(
        rollout_id, (np.zeros(2, np.int64),), (1,), column, (0.0,), (0.0,), (False,), (0,), (0,)
    )  # one sample


def make_pair(log, **flags):
    column = (np.zeros(1, np.float32),)
    config = Config.of(train_backend="fsdp", rollout_batch_size=1, advantage_estimator="ppo", **flags)
    columns = {"actor": {"log_probs": column, "ref_log_probs": column}, "critic": {"values": column}}
    return assemble(config, lambda name: Role(name, log, columns[name]))


def test_the_critic_values_the_rollout_and_both_train_on_it():
    log = []
    report = make_pair(log).train(make_batch())
    assert log == [("critic", "score"), ("critic", "begin", True, False), ("actor", "begin", True, False)]
    assert report.metrics == {"rollout/critic": 1.0, "rollout/actor": 1.0}
    assert report.steps == ({"train/critic": 2.0, "train/actor": 2.0},)
    assert report.timings == {"critic": 3.0, "actor": 3.0}


def test_a_kl_penalty_brings_the_actors_log_probs_to_the_critic():
    log = []
    make_pair(log, kl_coef=0.1).train(make_batch())
    assert ("actor", "score") in log
    assert ("critic", "begin", True, True) in log


def test_on_the_first_rollouts_the_critic_trains_alone():
    log = []
    pair = make_pair(log, num_critic_only_steps=2)
    trained = [[role for role, what, *_ in log if what == "begin"] for _ in [pair.train(make_batch(1))]]
    log.clear()
    pair.train(make_batch(2))
    assert trained == [["critic"]]
    assert [role for role, what, *_ in log if what == "begin"] == ["critic", "actor"]


def test_a_checkpoint_holds_both_and_gives_both_back(tmp_path):
    log = []
    pair = make_pair(log, critic_save=str(tmp_path / "critic"))
    with checkpoint.publish(tmp_path, checkpoint.DriverState(rollout_id=0, metrics_offset=0)) as partial:
        pair.save(partial.actor)
    pair.load(checkpoint.latest(tmp_path).actor)
    assert log == [("actor", "load", "actor"), ("critic", "load", "critic")]
    assert (tmp_path / "critic" / "weights").read_text() == "critic"


def test_a_critic_goes_on_from_another_run(tmp_path):
    with checkpoint.publish(tmp_path, checkpoint.DriverState(rollout_id=0, metrics_offset=0)) as partial:
        make_pair([]).save(partial.actor)
    log = []
    make_pair(log, critic_load=str(tmp_path)).start()
    assert log == [("actor", "start"), ("critic", "start"), ("critic", "load", "critic")]


def test_other_algorithms_have_no_critic():
    config = Config.of(train_backend="fsdp", rollout_batch_size=1)
    made = []
    assert assemble(config, lambda name: made.append(name) or name) == "actor"
    assert made == ["actor"]


def test_the_actor_is_closed_when_the_critic_fails_to():
    log = []

    class Stuck(Role):
        def close(self):
            raise OSError("stuck")

    config = Config.of(train_backend="fsdp", rollout_batch_size=1, advantage_estimator="ppo")
    pair = ActorCritic(config, Role("actor", log, {}), Stuck("critic", log, {}))
    with pytest.raises(OSError, match="stuck"):
        pair.close()
    assert log == [("actor", "close")]


def test_both_give_their_memory_up():
    log = []
    pair = make_pair(log)
    assert pair.offload() == 6
    pair.onload()
    assert log == [("actor", "offload"), ("critic", "offload"), ("actor", "onload"), ("critic", "onload")]

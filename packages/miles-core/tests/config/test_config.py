import copy
import pickle

import pytest

from miles.core.config import Config
from miles.core.errors import ConfigError
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.logging import Logging


def test_values_are_reached_typed_and_flat():
    config = Config.of(eps_clip=0.1)
    assert config[Algorithm].eps_clip == 0.1
    assert config.eps_clip == 0.1
    assert config.origin["eps_clip"] == "flag"
    assert config.origin["kl_coef"] == "default"


def test_groups_and_configuration_are_read_only():
    config = Config.of()
    with pytest.raises(AttributeError, match="read-only"):
        config.eps_clip = 1
    with pytest.raises(Exception, match="frozen"):
        config[Algorithm].eps_clip = 1


def test_an_unknown_attribute_names_the_nearest():
    with pytest.raises(AttributeError, match="did you mean 'eps_clip'"):
        _ = Config.of().eps_clp
    assert getattr(Config.of(), "my_own", None) is None


def test_it_survives_pickling_and_copying():
    config = Config.of(eps_clip=0.1, my_own=[1])
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert twin == config
        assert twin[Algorithm].eps_clip_high == 0.1
        assert twin.origin["eps_clip_high"] == "inherited"
        assert twin.my_own == [1]


def test_values_given_by_name_are_checked():
    with pytest.raises(ConfigError, match="--eps-clip -1: expected at least 0"):
        Config.of(eps_clip=-1)


def test_names_that_no_flag_has_are_for_hooks():
    config = Config.of(my_own=3)
    assert config.my_own == 3
    assert config.values()["my_own"] == 3


def test_secrets_are_not_written():
    config = Config.of(wandb_key="hunter2", use_wandb=True)
    assert config[Logging].wandb_key == "hunter2"
    assert config.record()["wandb_key"] == "***"
    assert "hunter2" not in repr(config)
    assert Config.of().record()["wandb_key"] is None


def test_a_group_that_is_not_there_is_a_key_error():
    with pytest.raises(KeyError, match="Lonely"):
        Config.of()[type("Lonely", (), {})]


def test_no_resolved_field_is_left_without_a_value():
    config = Config.of()
    for name in ("eps_clip_high", "global_batch_size", "num_steps_per_rollout", "train_dtype", "lr_decay_style"):
        assert getattr(config, name) is not None


def test_examine_shows_what_can_be_understood():
    config, problems = Config.examine(["--lr", "x", "--eps-clip", "0.5"])
    assert config.eps_clip == 0.5
    assert config.lr == 1e-6
    assert any("--lr x" in problem for problem in problems)

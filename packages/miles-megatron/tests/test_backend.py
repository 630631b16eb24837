import pytest

from miles.core.config import Config
from miles.core.errors import ConfigError
from miles.core.protocols.backend import Rank
from miles.core.registry import Registry
from miles.megatron.backend import MegatronBackend

BATCH = ("--rollout-batch-size", "8")


def test_it_is_found_by_name():
    assert Registry("miles.train_backends").get("megatron") is MegatronBackend


def test_nobody_typed_it_and_the_error_says_what_to_type():
    _, problems = Config.examine(BATCH)
    assert "--train-backend megatron, which is the default, does not exist yet. Type --train-backend fsdp" in problems


def test_typed_it_is_refused_as_well():
    _, problems = Config.examine([*BATCH, "--train-backend", "megatron"])
    assert "--train-backend megatron does not exist yet. Type --train-backend fsdp" in problems


def test_it_never_trains_with_another_backend_instead():
    with pytest.raises(ConfigError, match="does not exist yet"):
        MegatronBackend().create(Config.of(), Rank())


def test_its_schedule_decays_as_megatron_does():
    config = Config.of()
    assert config.lr_decay_style == "linear"
    assert config.origin["lr_decay_style"] == "backend"


@pytest.mark.parametrize("flag", ["--megatron-to-hf-mode bridge", "--mtp-num-layers 1", "--enable-mtp-training"])
def test_its_flags_are_refused_by_name(flag):
    _, problems = Config.examine([*BATCH, *flag.split()])
    assert any(problem.startswith(flag.split()[0]) and "not supported" in problem for problem in problems)

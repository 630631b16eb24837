import pickle

import pytest

from miles.core.config import Config
from miles.core.registry import Registry
from miles.megatron.backend import MegatronBackend
from miles.megatron.flags import TransformerFlags

BATCH = ("--rollout-batch-size", "8", "--train-backend", "megatron")


def test_it_is_found_by_name():
    assert Registry("miles.train_backends").get("megatron") is MegatronBackend


def test_its_schedule_decays_as_megatron_does():
    config = Config.of()
    assert config.lr_decay_style == "linear"
    assert config.origin["lr_decay_style"] == "backend"


@pytest.mark.parametrize("mode", ["raw", "bridge"])
def test_either_word_for_the_conversion_of_weights_is_taken(mode):
    _, problems = Config.examine([*BATCH, "--megatron-to-hf-mode", mode])
    assert not any("--megatron-to-hf-mode" in problem for problem in problems)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--tensor-model-parallel-size 2", "does not divide the 1 trainer ranks"),
        ("--actor-num-gpus-per-node 2 --expert-model-parallel-size 4", "--expert-model-parallel-size 4"),
        ("--virtual-pipeline-model-parallel-size 2", "give --pipeline-model-parallel-size"),
        ("--qkv-format bshd", "packs samples"),
        ("--enable-mtp-training", "--mtp-num-layers counts"),
        (
            "--actor-num-gpus-per-node 4 --tensor-model-parallel-size 2 --expert-model-parallel-size 2",
            "needs --sequence-parallel",
        ),
    ],
)
def test_impossible_layouts_are_found_before_a_run(flags, complaint):
    _, problems = Config.examine([*BATCH, *flags.split()])
    assert any(complaint in problem for problem in problems)


def test_every_field_of_the_installed_megatron_core_has_a_flag():
    config = Config.of(
        train_backend="megatron", recompute_granularity="selective", recompute_modules=["core_attn", "mlp"]
    )
    assert config.recompute_modules == ["core_attn", "mlp"]
    assert config.moe_router_topk is None
    _, problems = Config.examine([*BATCH, "--recompute-granularity", "some"])
    assert any("--recompute-granularity" in problem for problem in problems)


def test_a_configuration_travels_to_other_processes():
    assert TransformerFlags.__module__ == "miles.megatron.flags"
    config = pickle.loads(pickle.dumps(Config.of(recompute_granularity="full")))
    assert config[TransformerFlags].recompute_granularity == "full"

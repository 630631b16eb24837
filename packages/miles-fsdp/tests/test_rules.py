import pytest

from miles.core.config import Config

BATCH = ("--rollout-batch-size", "8", "--train-backend", "fsdp")


def test_the_cpu_uses_the_attention_of_pytorch():
    config = Config.from_flags([*BATCH, "--device", "cpu"], check=False)
    assert config.attn_implementation == "sdpa"
    assert config.origin["attn_implementation"] == "derived"


def test_the_schedule_is_constant_unless_said_otherwise():
    config = Config.from_flags(BATCH, check=False)
    assert (config.lr_decay_style, config.origin["lr_decay_style"]) == ("constant", "backend")
    assert Config.from_flags([*BATCH, "--lr-decay-style", "cosine"], check=False).lr_decay_style == "cosine"


@pytest.mark.parametrize(("replicas", "refused"), [("2", False), ("3", True)])
def test_replicas_divide_the_ranks(replicas, refused):
    _, problems = Config.examine(
        [*BATCH, "--device", "cpu", "--actor-num-gpus-per-node", "4", "--dp-replicate-size", replicas]
    )
    assert any("--dp-replicate-size 3 does not divide the 4" in problem for problem in problems) is refused


@pytest.mark.parametrize(
    ("implementation", "refused"), [("flash_attention_2", True), ("sdpa", False), ("eager", False)]
)
def test_flash_attention_is_refused_on_the_cpu(implementation, refused):
    _, problems = Config.examine([*BATCH, "--device", "cpu", "--attn-implementation", implementation])
    assert any("flash_attention_2" in problem for problem in problems) is refused


@pytest.mark.parametrize(("size", "refused"), [("2", False), ("3", True)])
def test_ranks_that_share_samples_divide_all_ranks(size, refused):
    _, problems = Config.examine(
        [*BATCH, "--device", "cpu", "--actor-num-gpus-per-node", "4", "--context-parallel-size", size]
    )
    assert any("--context-parallel-size 3 does not divide the 4" in problem for problem in problems) is refused


@pytest.mark.parametrize(
    ("flag", "path", "refused"),
    [
        ("--custom-pg-loss-reducer-function-path", "math.fsum", True),
        ("--custom-tis-function-path", "math.fsum", True),
        ("--custom-tis-function-path", "icepop", False),
    ],
)
def test_functions_of_whole_samples_are_refused_where_ranks_share_them(flag, path, refused):
    _, problems = Config.examine(
        [*BATCH, "--device", "cpu", "--actor-num-gpus-per-node", "2", "--context-parallel-size", "2", flag, path]
    )
    assert any("is called with whole samples" in problem for problem in problems) is refused


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--lora-rank", "8"), None),
        (("--lora-adapter-path", "somewhere"), "needs --lora-rank"),
    ],
)
def test_adapters_need_a_rank(flags, problem):
    _, problems = Config.examine([*BATCH, "--device", "cpu", *flags])
    found = [each for each in problems if "lora" in each]
    assert found == [] if problem is None else problem in found[0]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--fp16",), None),
        (("--fp16", "--train-dtype", "bf16"), "--fp16 and --train-dtype bf16 contradict each other"),
        (("--fsdp-cpu-offload",), "where --device cpu has them anyway"),
        (("--fsdp-state-dict-cpu-offload",), "where --device cpu has them anyway"),
    ],
)
def test_precision_and_offloading_fit_device_and_backend(flags, problem):
    _, problems = Config.examine([*BATCH, "--device", "cpu", *flags])
    found = [each for each in problems if "--fp16" in each or "dtype" in each or "offload" in each]
    assert found == [] if problem is None else any(problem in each for each in found)


def test_fp16_is_a_precision():
    assert Config.from_flags([*BATCH, "--device", "cpu", "--fp16"], check=False).train_dtype == "fp16"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ((), None),
        (("--attn-implementation", "flash_attention_2"), "does not pack them"),
        (("--use-dynamic-batch-size", "--max-tokens-per-gpu", "64"), "--qkv-format bshd pads samples"),
        (("--context-parallel-size", "2", "--actor-num-gpus-per-node", "2"), "--qkv-format bshd keeps samples whole"),
    ],
)
def test_rows_of_single_samples_exclude_what_shares_rows(flags, problem):
    _, problems = Config.examine([*BATCH, "--device", "cpu", "--qkv-format", "bshd", *flags])
    found = [each for each in problems if "bshd" in each]
    assert found == [] if problem is None else any(problem in each for each in found)


@pytest.mark.parametrize(
    ("flags", "obstacle"),
    [
        ((), None),
        (("--train-backend", "megatron"), "--train-backend megatron"),
        (("--context-parallel-size", "2", "--actor-num-gpus-per-node", "2"), "--context-parallel-size 2"),
        (("--loss-type", "custom_loss", "--custom-loss-function-path", "own.loss"), "--loss-type custom_loss"),
        (("--async-training",), "asynchronous training"),
    ],
)
def test_the_engines_arithmetic_has_its_conditions(flags, obstacle):
    _, problems = Config.examine([*BATCH, "--device", "cpu", "--true-on-policy-mode", *flags])
    found = [each for each in problems if each.startswith("--true-on-policy-mode contradicts")]
    assert found == [] if obstacle is None else any(f"contradicts {obstacle}:" in each for each in found)


@pytest.mark.parametrize("flag", ["--use-routing-replay", "--use-rollout-routing-replay"])
def test_routing_is_replayed_elsewhere_and_the_flag_that_was_given_is_named(flag):
    _, problems = Config.examine([*BATCH, "--device", "cpu", flag])
    assert f"{flag}: the fsdp backend replays no recorded routing. Use --train-backend megatron" in problems

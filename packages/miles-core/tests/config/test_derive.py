import pytest


def test_a_value_is_inherited_until_it_is_given(resolve):
    config = resolve("--eps-clip", "0.3")
    assert (config.eps_clip_high, config.origin["eps_clip_high"]) == (0.3, "inherited")
    assert config.reason["eps_clip_high"] == "from --eps-clip"
    assert resolve("--eps-clip", "0.3", "--eps-clip-high", "0.4").eps_clip_high == 0.4


@pytest.mark.parametrize(
    ("flag", "value", "heir"),
    [
        ("--reward-key", "score", "eval_reward_key"),
        ("--hf-checkpoint", "model", "ref_load"),
    ],
)
def test_heirs(resolve, flag, value, heir):
    config = resolve(flag, value)
    assert str(getattr(config, heir)) == value
    assert config.origin[heir] == "inherited"


def test_a_derived_value_never_overrides_a_typed_one(resolve):
    config = resolve("--device", "cpu", "--train-dtype", "bf16", "--distributed-backend", "nccl")
    assert (config.train_dtype, config.distributed_backend) == ("bf16", "nccl")
    assert config.origin["distributed_backend"] == "flag"


def test_colocated_engines_have_the_accelerators_of_the_trainer(resolve):
    config = resolve("--colocate", "--actor-num-nodes", "2", "--actor-num-gpus-per-node", "4")
    assert config.rollout_num_gpus == 8


def test_a_group_of_one_is_not_divided_by_its_deviation(resolve):
    assert resolve().grpo_std_normalization is False
    assert resolve("--n-samples-per-prompt", "4").grpo_std_normalization is True


def test_dump_details_names_the_dump_unless_it_is_named(resolve):
    assert resolve("--dump-details", "d").save_debug_rollout_data == "d/rollout_data/{rollout_id}.jsonl"
    assert resolve("--dump-details", "d", "--save-debug-rollout-data", "x.pt").save_debug_rollout_data == "x.pt"


def test_loaded_samples_replace_the_engines(resolve):
    assert resolve("--load-debug-rollout-data", "x_{rollout_id}.pt").debug_train_only is True


def test_the_cpu_brings_its_own_defaults(resolve):
    config = resolve("--device", "cpu")
    assert config.distributed_backend == "gloo"
    assert config.train_dtype == "fp32"
    assert config.actor_num_gpus_per_node == 1
    assert resolve("--device", "cpu", "--actor-num-gpus-per-node", "2").actor_num_gpus_per_node == 2


def test_an_accelerator_brings_its_own_defaults(resolve):
    config = resolve("--device", "cuda")
    assert config.distributed_backend == "nccl"
    assert config.train_dtype == "bf16"
    assert config.actor_num_gpus_per_node == 8


def test_auto_is_replaced_by_what_the_machine_has(resolve):
    assert resolve().device in ("cpu", "cuda")


def test_supervised_fine_tuning_needs_no_advantages(resolve):
    assert resolve("--loss-type", "sft_loss").compute_advantages_and_returns is False


def test_the_critic_takes_after_the_actor(resolve):
    config = resolve("--lr", "0.5", "--actor-num-gpus-per-node", "4")
    assert (config.critic_lr, config.critic_num_gpus_per_node) == (0.5, 4)


def test_dumped_details_include_what_was_trained_on(resolve):
    config = resolve("--dump-details", "d")
    assert config.save_debug_train_data == "d/train_data/{rollout_id}_{rank}.safetensors"
    assert resolve("--dump-details", "d", "--save-debug-train-data", "own").save_debug_train_data == "own"


def test_the_warm_up_has_two_names(resolve, problems):
    assert resolve().lr_warmup_fraction is None
    assert resolve("--warmup-ratio", "0.03").lr_warmup_fraction == 0.03
    assert problems("--warmup-ratio", "0.1", "--lr-warmup-fraction", "0.2", "--num-rollout", "9", about="two names")


def test_a_resumed_schedule_comes_from_one_place(problems):
    assert problems("--override-lr-scheduler", "--use-checkpoint-lr-scheduler", about="--override-lr-scheduler takes")


@pytest.mark.parametrize(
    ("flags", "train", "engines"),
    [
        ("", None, None),
        ("--offload", True, True),
        ("--offload --no-offload-train", False, True),
        ("--colocate --device cuda", True, True),
        ("--colocate --device cuda --no-offload-rollout", True, False),
        ("--colocate --device cuda --debug-rollout-only", None, None),
        ("--colocate --device cpu", None, None),
    ],
)
def test_who_shares_accelerators_takes_turns(resolve, flags, train, engines):
    config = resolve(*flags.split())
    assert (config.offload_train, config.offload_rollout) == (train, engines)

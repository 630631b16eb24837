from typing import Annotated

import pytest

from miles.core.config.discover import build_table
from miles.core.config.draft import Draft, Origin
from miles.core.config.group import Flag, Group
from miles.core.config.pipeline import _refuse_unsupported

LARGE_ENGINE = ("--device", "cuda", "--actor-num-gpus-per-node", "6", "--rollout-num-gpus-per-engine")


@pytest.mark.parametrize(
    ("flags", "about"),
    [
        (("--kl-coef", "0.1", "--kl-loss-coef", "0.1", "--use-kl-loss"), "--kl-coef 0.1 and --kl-loss-coef 0.1"),
        (("--advantage-estimator", "reinforce_plus_plus"), "needs --normalize-advantages"),
        (("--use-rollout-logprobs", "--use-tis"), "exclude each other"),
        (("--get-mismatch-metrics",), "needs --custom-tis-function-path"),
        (("--use-dynamic-batch-size",), "needs --max-tokens-per-gpu"),
        (("--loss-type", "custom_loss"), "go together"),
        (("--custom-loss-function-path", "a.b"), "go together"),
        (("--lr-warmup-iters", "3", "--lr-warmup-fraction", "0.1"), "both set the warm-up"),
        (("--lr-decay-style", "WSD"), "needs --lr-wsd-decay-iters"),
        ((), "--num-rollout is required"),
        (("--num-epoch", "2", "--disable-rollout-global-dataset"), "Give --num-rollout"),
        (("--num-rollout", "5", "--start-rollout-id", "5"), "nothing would be done"),
        (("--debug-rollout-only", "--debug-train-only"), "nothing would be left of the run"),
        (("--save", "run", "--save-hf", "hf/{step}"), "only {rollout_id} is filled in"),
        (("--save-debug-rollout-data", "{"), "only {rollout_id} is filled in"),
        (("--debug-train-only",), "needs --load-debug-rollout-data"),
        (("--executor", "local", "--actor-num-gpus-per-node", "2"), "--executor local runs one trainer rank"),
        (("--executor", "local", "--ray-address", "auto"), "contradicts --executor local"),
        (("--device", "cpu", "--train-env-vars", '{"A": "1"}'), "--train-env-vars"),
        (("--colocate", "--rollout-num-gpus", "5"), "contradicts --colocate"),
        ((*LARGE_ENGINE, "12", "--executor", "ray"), "no multiple of it"),
        ((*LARGE_ENGINE, "16", "--executor", "local"), "needs a Ray cluster"),
        ((*LARGE_ENGINE, "4", "--colocate", "--actor-num-nodes", "2"), "do not fit on the --actor-num-gpus-per-node 6"),
        (("--device", "cpu", "--distributed-backend", "nccl"), "Use gloo"),
        ((), "--hf-checkpoint is required"),
        ((), "--prompt-data is required"),
        (("--train-backend", "fspd"), "--train-backend fspd"),
        (("--tracker", "tensorbord"), "Did you mean 'tensorboard'"),
        (("--data-source-path", "no_such_package.Source"), "there is no package 'no_such_package'"),
        (("--custom-reward-post-process-path", "reward"), "expected a dotted path"),
    ],
)
def test_a_contradiction_is_reported(problems, flags, about):
    assert len(problems(*flags, about=about)) == 1


@pytest.mark.parametrize(
    ("flags", "about"),
    [
        (("--kl-coef", "0.1", "--advantage-estimator", "ppo"), "--kl-loss-coef"),
        (("--advantage-estimator", "reinforce_plus_plus", "--normalize-advantages"), "--normalize-advantages"),
        (("--use-dynamic-batch-size", "--max-tokens-per-gpu", "9"), "--max-tokens-per-gpu"),
        (("--num-epoch", "2"), "--num-rollout"),
        ((*LARGE_ENGINE, "16", "--executor", "ray"), "needs a Ray cluster"),
        (("--disable-rollout-global-dataset",), "--prompt-data"),
        (("--debug-train-only", "--loss-type", "sft_loss"), "--debug-train-only"),
        (("--debug-train-only", "--load-debug-rollout-data", "x.pt"), "--debug-train-only"),
        (("--use-kl-loss", "--kl-loss-coef", "0.0", "--kl-loss-type", "low_var_kl"), "--kl-loss"),
    ],
)
def test_what_fits_together_is_accepted(problems, flags, about):
    assert not problems(*flags, about=about)


@pytest.mark.parametrize(
    "flags",
    [
        ("--save-interval", "3"),
        ("--max-tokens-per-gpu", "100"),
        ("--kl-loss-coef", "0.1"),
        ("--tis-clip", "3"),
        ("--opsm-delta", "0.1"),
        ("--wandb-project", "x"),
        ("--tensorboard-dir", "x"),
        ("--custom-tis-function-path", "a.b"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(problems, flags):
    assert len(problems(*flags, about=f"{flags[0]} has no effect without")) == 1


def test_a_flag_at_its_default_needs_nothing(problems):
    assert not problems("--tis-clip", "2.0", about="--tis-clip")


def test_files_that_are_missing_are_named(problems, tmp_path, hf_checkpoint):
    missing = str(tmp_path / "gone")
    assert problems("--hf-checkpoint", missing, about="there is no such directory")
    assert problems("--hf-checkpoint", str(tmp_path), about="holds no config.json")
    assert problems("--ref-load", missing, about=f"--ref-load {missing}")
    assert problems("--load", missing, about=f"--load {missing}")
    assert problems("--prompt-data", missing + ".jsonl", about="there is no such file")
    assert not problems("--hf-checkpoint", hf_checkpoint, about="--hf-checkpoint")


def test_a_reference_may_be_a_checkpoint_of_a_run(problems, tmp_path, hf_checkpoint):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    (tmp_path / "iter_0000007").mkdir()
    run = ("--ref-load", str(tmp_path))
    assert not problems(*run, about="--ref")
    assert not problems(*run, "--ref-ckpt-step", "7", about="--ref")
    assert problems(*run, "--ref-ckpt-step", "5", about="it has the checkpoints 7")
    assert problems("--ref-load", hf_checkpoint, "--ref-ckpt-step", "5", about="chooses among the checkpoints of a run")


def test_a_checkpoint_of_a_run_is_named_by_the_directory_of_the_run(problems, tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    (tmp_path / "iter_0000007").mkdir()
    assert problems("--ref-load", str(tmp_path / "iter_0000007"), about=f"one of the checkpoints of {tmp_path}")


def test_adapters_are_not_trained_on_a_model_that_engines_do_not_have(problems, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    flags = ("--load", str(tmp_path), "--lora-rank", "4")
    assert problems(*flags, about="--load")
    assert not problems(*flags[:2], about="--load")


def test_a_run_may_name_the_directory_it_will_save_to(problems, tmp_path):
    fresh = str(tmp_path / "run")
    assert not problems("--load", fresh, "--save", fresh, about="--load")


def test_prompt_data_may_be_sliced(problems, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("{}\n")
    assert not problems("--prompt-data", f"{path}@[0:10],{path}", about="--prompt-data")


def test_an_unsupported_flag_is_refused_by_name():
    class Planned(Group):
        title = "Planned"

        half_done: Annotated[int | None, Flag(unsupported="the other half is missing")] = None
        """A number."""

    draft = Draft(build_table([("acme", (Planned,))]).flags)
    _refuse_unsupported(draft)
    assert not draft.problems
    draft.set("half_done", 1, Origin.FLAG, "")
    _refuse_unsupported(draft)
    assert draft.problems == ["--half-done 1: not supported: the other half is missing. Leave it out"]


@pytest.mark.parametrize(
    ("flags", "about"),
    [
        (("--use-pytorch-profiler",), "needs --profile-dir, or --save"),
        (("--use-pytorch-profiler", "--profile-step-start", "5", "--profile-step-end", "5"), "no rollout would be"),
        (("--profile-target", "train_actor"), "no effect without --use-pytorch-profiler"),
        (("--record-memory-history", "--device", "cpu"), "--memory-recorder memray"),
        (("--ci-metric-checker-key", "eval/sums"), "go together"),
        (("--ci-metric-checker-key", "a", "--ci-metric-checker-threshold", "1"), "Give --eval-interval"),
        (("--ci-disable-kl-checker",), "no effect without --ci-test"),
        (("--save-debug-train-data", "{step}"), "only {rollout_id}, {rank} are filled in"),
        (("--ci-save-grad-norm", "{rank}"), "only {role}, {rollout_id}, {step_id} are filled in"),
    ],
)
def test_debugging_without_what_it_needs_is_reported(problems, flags, about):
    assert len(problems(*flags, about=about)) == 1


def test_flags_of_the_critic_need_one(problems):
    (problem,) = problems("--critic-lr", "1e-3", about="--critic-lr")
    assert "--advantage-estimator ppo" in problem
    assert not problems("--critic-lr", "1e-3", "--advantage-estimator", "ppo", about="--critic-lr")


def test_the_actor_trains_after_the_critic_alone(problems):
    ppo = ("--advantage-estimator", "ppo", "--num-rollout", "4", "--num-critic-only-steps")
    assert problems(*ppo, "4", about="--num-critic-only-steps")
    assert not problems(*ppo, "3", about="--num-critic-only-steps")


def test_a_critic_of_several_ranks_is_not_local(problems):
    flags = ("--advantage-estimator", "ppo", "--executor", "local", "--critic-num-gpus-per-node", "2")
    (problem,) = problems(*flags, about="critic rank")
    assert "--executor ray" in problem


def test_an_unsupported_flag_at_its_default_is_accepted(problems):
    assert not problems("--qkv-format", "thd", about="--qkv-format")


def test_a_refused_value_is_not_complained_about_twice(problems):
    assert len(problems("--num-rollout", "many", about="--num-rollout")) == 1


def test_everything_is_reported_together(problems):
    found = problems("--lr", "fast", "--eps-clp", "1", "--use-tis", "--use-rollout-logprobs", about="--")
    for text in ("--lr fast", "--eps-clp", "--use-tis", "--hf-checkpoint", "--num-rollout", "--prompt-data"):
        assert any(text in problem for problem in found), text


def test_asynchronous_training_needs_accelerators_for_both_and_old_log_probs_for_ppo(problems):
    assert problems("--update-weights-interval", "2", about="--async-training")
    assert not problems("--update-weights-interval", "2", "--async-training", about="--update-weights-interval")
    (problem,) = problems("--async-training", "--colocate", about="take turns")
    assert "--rollout-num-gpus" in problem


def test_trainer_and_engines_take_turns_only_where_one_works_at_a_time(problems):
    (problem,) = problems("--offload", "--async-training", about="--offload-train and --offload-rollout")
    assert "runs both at once" in problem
    assert not problems("--offload", about="offload")


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ((), False),
        (("--train-backend", "fsdp", "--use-kl-loss"), False),
        (("--use-kl-loss",), True),
        (("--keep-old-actor",), True),
    ],
)
def test_host_memory_without_copies_of_weights_is_promised_or_refused(problems, flags, refused):
    assert bool(problems("--disable-weights-backuper", *flags, about="--disable-weights-backuper")) is refused


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--actor-num-gpus-per-node", "2"), "a trainer of 2 ranks needs Ray"),
        (("--actor-num-gpus-per-node", "1", "--executor", "ray"), "--executor ray or --ray-address needs Ray"),
    ],
)
def test_ray_is_missed_for_what_needs_it(problems, monkeypatch, flags, told):
    monkeypatch.setattr("miles.core.hardware.is_installed", lambda package: package != "ray")
    assert problems("--device", "cpu", *flags, about=told)

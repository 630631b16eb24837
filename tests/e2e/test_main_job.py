"""The whole job with its real parts: engine, router, reward, trainer, weights back to the engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.e2e


def events(run: Path, kind: str) -> list[dict]:
    return [event for line in (run / "metrics.jsonl").open() if (event := json.loads(line))["kind"] == kind]


def export_flags(run: Path) -> list[str]:
    return ["--save-hf", str(run / "hf" / "{rollout_id}")]


@pytest.fixture(scope="module")
def finished(toy, miles, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("grpo") / "run"
    miles("train", *toy.flags(run, *export_flags(run)))
    return run


def test_every_rollout_is_logged_with_its_steps_and_evaluations(finished):
    assert [event["step"] for event in events(finished, "rollout")] == [0, 1, 2, 3]
    assert [event["step"] for event in events(finished, "train")] == list(range(8))
    assert [event["step"] for event in events(finished, "eval")] == [0, 2, 4]


def test_engine_and_trainer_agree_on_the_log_probs_of_every_rollout(finished):
    for event in events(finished, "train")[::2]:
        assert event["metrics"]["train/train_rollout_logprob_abs_diff"] < 1e-5
        assert abs(event["metrics"]["train/ppo_kl"]) < 1e-6, "the first step of a rollout is on-policy"


def test_engine_holds_the_weights_of_its_version(finished):
    for rollout_id in range(4):
        rows = [json.loads(line) for line in (finished / "rollouts" / f"rollout_{rollout_id:07d}.jsonl").open()]
        assert len(rows) == 16
        assert {version for row in rows for version in row["weight_versions"]} == {str(rollout_id)}


def test_finished_run_holds_what_a_person_looks_for(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "rollouts", "logs", "report.html", "iter_0000003"}
    assert (finished / "latest_checkpointed_iteration.txt").read_text() == "3\n"
    config = json.loads((finished / "config.json").read_text())
    assert config["lr"] == {"value": 0.01, "origin": "flag"}
    assert "<html" in (finished / "report.html").read_text()[:500]


def test_exported_model_is_loaded_by_transformers(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "hf" / "3")
    assert AutoTokenizer.from_pretrained(finished / "hf" / "3").chat_template
    exported = load_file(finished / "hf" / "3" / "model.safetensors")
    assert (model.model.embed_tokens.weight == exported["model.embed_tokens.weight"]).all()


@pytest.mark.slow
def test_two_ranks_under_ray_train_like_one(toy, miles, finished, tmp_path):
    run = tmp_path / "ray"
    flags = toy.flags(run, *export_flags(run), "--num-rollout", "1", "--eval-interval", "1000")
    flags[flags.index("--actor-num-gpus-per-node") + 1] = "2"
    miles("train", *flags)
    one, two = events(finished, "train")[:2], events(run, "train")
    assert len(two) == 2
    for first, second in zip(one, two, strict=True):
        for name in ("train/loss", "train/grad_norm", "train/pg_loss"):
            assert second["metrics"][name] == pytest.approx(first["metrics"][name], rel=1e-4, abs=1e-6)
    expected, found = (
        load_file(finished / "hf" / "0" / "model.safetensors"),
        load_file(run / "hf" / "0" / "model.safetensors"),
    )
    for name, tensor in expected.items():
        assert (tensor - found[name]).abs().max() < 1e-4, name


def test_supervised_training_needs_no_engine_and_lowers_the_loss(toy, miles, tmp_path):
    run = tmp_path / "sft"
    miles(
        "train",
        *("--train-backend", "fsdp", "--actor-num-gpus-per-node", "1", "--device", "cpu", "--train-num-threads", "1"),
        *("--hf-checkpoint", str(toy.checkpoint), "--save", str(run), "--lr", "1e-2"),
        *("--prompt-data", str(toy.data.demonstrations), "--input-key", "messages", "--rollout-function-path", "sft"),
        *("--loss-type", "sft_loss", "--disable-compute-advantages-and-returns", "--calculate-per-token-loss"),
        *("--num-rollout", "8", "--rollout-batch-size", "8", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "512"),
    )
    losses = [event["metrics"]["train/loss"] for event in events(run, "train")]
    assert len(losses) == 8
    assert losses[-1] < 0.8 * losses[0]
    assert not list((run / "logs").glob("engine*")), "no engine was started"


def test_all_mistakes_are_reported_together_before_anything_starts(toy, miles, tmp_path):
    run = tmp_path / "run"
    done = miles(
        "train",
        *toy.flags(run, "--global-batch-size", "7", "--kl-coef", "0.1", "--kl-loss-coef", "0.1", "--rm-type", "mth"),
        check=False,
    )
    assert done.returncode == 2
    for words in ("--global-batch-size", "--kl-loss-coef", "math"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not run.exists()


def test_misspelt_flag_is_answered_with_the_nearest_one(miles):
    done = miles("train", "--rollout-batchsize", "4", check=False)
    assert done.returncode == 2
    assert "--rollout-batch-size" in done.stderr

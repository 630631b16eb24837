"""A run directory as a short GRPO run leaves it, made without a run."""

import json
import math
import random

import pytest

from miles.core.run_directory import RunDirectory
from miles.core.tracking.jsonl import JsonlTracker

QUESTIONS = [(814, 707), (780, 267), (404, 666), (123, 456), (999, 1), (350, 350)]


def make_run(path, *, num_rollout=40, evaluations=True, seed=0):
    """Metrics, samples and configuration in which rewards and lengths rise."""
    rng = random.Random(seed)
    run = RunDirectory(path).create()
    write_config(run, num_rollout)
    tracker = JsonlTracker(None, path)
    for rollout_id in range(num_rollout + 1):
        skill = 1 - math.exp(-rollout_id / 10)
        if evaluations and rollout_id in (0, num_rollout // 2, num_rollout):
            rows = write_samples(run.eval_samples(rollout_id, "sums"), rng, skill, group_size=1)
            score = sum(row["reward"] for row in rows) / len(rows)
            tracker.log({"eval/sums": score}, step=rollout_id, kind="eval", rollout_id=rollout_id)
        if rollout_id == num_rollout:
            break
        write_samples(run.rollout_samples(rollout_id), rng, skill, group_size=4)
        log_rollout(tracker, rollout_id, skill, rng)
    tracker.close()
    return run


def write_config(run, num_rollout):
    values = {
        "advantage_estimator": "grpo",
        "hf_checkpoint": "models/tiny",
        "num_rollout": num_rollout,
        "rollout_batch_size": 6,
        "n_samples_per_prompt": 4,
        "reward_key": None,
        "rm_type": "reasoning_gym",
        "lr": 3e-4,
        "eps_clip": 0.2,
    }
    run.write_config(
        values, dict.fromkeys(["advantage_estimator", "hf_checkpoint", "num_rollout", "rm_type", "lr"], "flag")
    )


def log_rollout(tracker, rollout_id, skill, rng):
    noise = rng.gauss(0, 0.04)
    for step in range(2):
        metrics = {
            "train/loss": 0.02 * rng.gauss(0, 1),
            "train/grad_norm": 0.5 + 0.1 * rng.random(),
            "train/ppo_kl": 1e-4 * step * rng.random(),
            "train/entropy_loss": 0.9 * (1 - skill) + 0.05,
            "train/train_rollout_logprob_abs_diff": 2e-6 * (1 + rng.random()),
            "train/pg_clipfrac": 0.01 * step * rng.random(),
        }
        tracker.log(metrics, step=2 * rollout_id + step, kind="train", rollout_id=rollout_id)
    generate = 0.3 + 0.2 * skill + 0.03 * rng.random()
    metrics = {
        "rollout/raw_reward": min(1.0, max(0.0, 0.35 + 0.6 * skill + noise)),
        "rollout/response_len/mean": 16 + 16 * skill + rng.random(),
        "perf/rollout_time": generate,
        "perf/log_probs_time": 0.08,
        "perf/actor_train_time": 0.25 + 0.02 * rng.random(),
        "perf/update_weights_time": 0.04,
        "perf/step_time": generate + 0.42,
        "perf/tokens_per_gpu_per_sec": 9000 + 3000 * skill,
    }
    tracker.log(metrics, step=rollout_id, kind="rollout", rollout_id=rollout_id)


def write_samples(path, rng, skill, *, group_size):
    rows = []
    for group, (a, b) in enumerate(QUESTIONS):
        rows += [sample_row(a, b, group, rng, skill) for _ in range(group_size)]
    for index, row in enumerate(rows):
        row["index"] = index
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def sample_row(a, b, group, rng, skill):
    right = rng.random() < 0.1 + 0.9 * skill
    answer = str(a + b if right else a + b + rng.choice((-1, 10, 100)))
    working = list("4+7+0=11 1+0+1=02 8+7+0=15") if right else []
    pieces = ["<think>", *working, "</think>", *answer, "<|im_end|>"]
    prompt_ids = [1, 5, 6, 7]
    return {
        "group_index": group,
        "prompt": f"<|im_start|>user\nCalculate {a} + {b}.<|im_end|>\n<|im_start|>assistant\n",
        "tokens": prompt_ids + [10 + len(piece) for piece in pieces],
        "response": "".join(pieces),
        "pieces": pieces,
        "response_length": len(pieces),
        "label": str(a + b),
        "reward": 1.0 if right else 0.0,
        "rollout_log_probs": [-rng.expovariate(4) for _ in pieces],
        "loss_mask": None,
        "status": "completed",
        "metadata": {},
    }


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "20260101-120000-quickstart")

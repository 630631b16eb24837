"""``docs/metrics.md`` against runs: what it promises is logged, and what is logged stands there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
SYNCHRONOUS = [
    "rollout/raw_reward",
    "rollout/rewards",
    "rollout/response_len/mean",
    "rollout/response_len/median",
    "rollout/response_len/max",
    "rollout/response_len/min",
    "rollout/response_lengths",
    "rollout/total_lengths",
    "rollout/truncated",
    "rollout/truncated_ratio",
    "rollout/repetition_frac",
    "rollout/zero_std/all_zero_percentage",
    "rollout/zero_std/all_one_percentage",
    "rollout/prefix_cache_hit_rate",
    "rollout/avg_cached_tokens_per_sample",
    "rollout/weight_version/min",
    "rollout/weight_version/max",
    "rollout/mixed_version_ratio",
    "rollout/avg_staleness",
    "rollout/max_staleness",
    "rollout/error_cat/scored",
    "rollout/reward/count",
    "passrate/pass@1",
    "passrate/pass@4",
    "rollout/log_probs",
    "rollout/rollout_log_probs",
    "rollout/ref_log_probs",
    "rollout/advantages",
    "rollout/returns",
    "rollout/entropy",
    "multi_turn/raw_response_length/response_length_mean",
    "multi_turn/wo_obs_response_length/response_length_clip_ratio",
    "correct_length/p25",
    "correct_length/p50",
    "correct_length/p75",
    "correct_length/p100",
    "correct_response_lengths",
    "correct_entropy",
    "perf/step_time",
    "perf/rollout_time",
    "perf/train_time",
    "perf/train_wait_time",
    "perf/wait_time_ratio",
    "perf/data_preprocess_time",
    "perf/log_probs_time",
    "perf/ref_log_probs_time",
    "perf/actor_train_time",
    "perf/actor_train_tok_per_s",
    "perf/actor_train_tflops",
    "perf/log_probs_tflops",
    "perf/ref_log_probs_tflops",
    "perf/save_model_time",
    "perf/eval_time",
    "perf/update_weights_time",
    "perf/update_weights_send_time",
    "perf/update_weights_wire_bytes",
    "perf/update_weights_density",
    "perf/weight_probe_abs_diff",
    "perf/sleep_time",
    "perf/wake_up_time",
    "perf/trainer_offloaded_bytes",
    "perf/release_engines_time",
    "perf/resume_engines_time",
    "perf/engines_released_bytes",
    "perf/tokens_per_gpu_per_sec",
    "perf/effective_tokens_per_gpu_per_sec",
    "perf/longest_sample_tokens_per_sec",
    "perf/longest_effective_sample_tokens_per_sec",
    "perf/start_time",
    "train/loss",
    "train/pg_loss",
    "train/entropy_loss",
    "train/pg_clipfrac",
    "train/ppo_kl",
    "train/kl_loss",
    "train/ois",
    "train/tis",
    "train/tis_clipfrac",
    "train/tis_abs",
    "train/train_rollout_logprob_abs_diff",
    "train/grad_norm",
    "train/lr-pg_0",
    "eval/sums",
    "eval/sums-truncated_ratio",
    "eval/sums-pass@1",
    "eval/sums-pass@2",
    "eval/sums/response_len/mean",
    "eval/sums/repetition_frac",
    "eval/sums/truncated_ratio",
    "eval/reward/count",
]
CONTINUOUS = [
    "rollout/values",
    "rollout/value_explained_variance",
    "rollout/returns",
    "rollout/engine_restarts",
    "rollout/fully_async/queue_size",
    "rollout/fully_async/queue_tokens",
    "rollout/fully_async/in_flight_groups",
    "rollout/fully_async/stale_groups_filtered",
    "rollout/fully_async/failed_groups",
    "rollout/fully_async/avg_staleness",
    "rollout/fully_async/max_staleness",
    "train/critic-loss",
    "train/critic-value_loss",
    "train/critic-value_clipfrac",
    "train/critic-grad_norm",
    "perf/critic_train_time",
]


def logged(run: Path) -> set[str]:
    return {name for line in (run / "metrics.jsonl").open() for name in json.loads(line)["metrics"]}


@pytest.fixture(scope="module")
def synchronous(toy, miles, tmp_path_factory) -> set[str]:
    run = tmp_path_factory.mktemp("metrics") / "run"
    everything = [
        *("--log-multi-turn", "--log-passrate", "--log-correct-samples", "--log-reward-category", "category"),
        *("--use-kl-loss", "--kl-loss-coef", "0.01", "--entropy-coef", "0.01", "--use-rollout-entropy", "--use-tis"),
        *("--n-samples-per-eval-prompt", "2", "--offload", "--num-rollout", "2"),
    ]
    miles("train", *toy.flags(run, *everything))
    return logged(run)


@pytest.fixture(scope="module")
def continuous(toy, miles, tmp_path_factory) -> set[str]:
    run = tmp_path_factory.mktemp("metrics") / "run"
    how = [
        *("--advantage-estimator", "ppo", "--use-rollout-logprobs", "--rollout-function-path", "fully_async"),
        *("--use-fault-tolerance", "--max-weight-staleness", "3", "--num-rollout", "2"),
    ]
    miles("train", *toy.flags(run, *how))
    return logged(run)


def test_a_run_logs_what_it_enables(synchronous, continuous):
    assert sorted(set(SYNCHRONOUS) - synchronous) == []
    assert sorted(set(CONTINUOUS) - continuous) == []


def test_what_is_logged_is_documented(synchronous, continuous):
    names = re.findall(r"`([^` ]+)`", "".join(line for line in PAGE.open() if line.startswith("| `")))
    patterns = [re.compile("[^ ]+".join(map(re.escape, re.split(r"\{x\}", name)))) for name in names]
    unknown = {name for name in synchronous | continuous if not any(found.fullmatch(name) for found in patterns)}
    assert sorted(unknown) == []

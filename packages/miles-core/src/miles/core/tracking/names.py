"""Which metric says what: the names that the console and the report look for among all that were logged."""

from __future__ import annotations

from collections.abc import Mapping

REWARD = "rollout/raw_reward"
"""Mean reward of the samples of a rollout, before group normalization."""
RESPONSE_LENGTH = "rollout/response_len/mean"
TRUNCATED = "rollout/truncated_ratio"
TOKENS_PER_S = "perf/tokens_per_gpu_per_sec"
STEP_TIME = "perf/step_time"
"""Seconds from one rollout to the next."""
LOSS = "train/loss"
GRAD_NORM = "train/grad_norm"
CLIPPED = "train/pg_clipfrac"
DISAGREEMENT = "train/train_rollout_logprob_abs_diff"
"""Mean over tokens of how far the log-probabilities of engine and trainer are apart, nats."""
REWARD_FAILURES = "rollout/reward/failed"
"""Share of the samples whose reward could not be computed."""
NO_ANSWER = "rollout/reward/category/no_answer"
ALL_ZERO, ALL_ONE = "rollout/zero_std/all_zero_percentage", "rollout/zero_std/all_one_percentage"
"""Shares of the groups all of whose rewards are 0, or 1."""

PHASES = {
    "perf/rollout_time": "generate",
    "perf/log_probs_time": "old log-probs",
    "perf/ref_log_probs_time": "reference log-probs",
    "perf/values_time": "values",
    "perf/actor_train_time": "train",
    "perf/critic_train_time": "train critic",
    "perf/update_weights_time": "send weights",
    "perf/save_model_time": "save",
    "perf/eval_time": "evaluate",
}
"""Timers that do not overlap, in the order in which a step goes through them."""


def phases(metrics: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a step by phase; what no phase accounts for is ``other``."""
    seconds = {title: metrics[name] for name, title in PHASES.items() if name in metrics}
    if STEP_TIME in metrics:
        rest = metrics[STEP_TIME] - sum(seconds.values())
        if rest > 0:
            seconds["other"] = rest
    return seconds


def eval_scores(metrics: Mapping[str, float]) -> dict[str, float]:
    """Mean reward by evaluation data set (``eval/NAME``; what has a suffix says something else)."""
    names = {name.removeprefix("eval/") for name in metrics if name.startswith("eval/") and name.count("/") == 1}
    suffixed = {name for name in names for other in names if name.startswith(f"{other}-")}
    return {name: metrics[f"eval/{name}"] for name in sorted(names - suffixed)}

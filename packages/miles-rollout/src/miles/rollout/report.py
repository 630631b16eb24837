"""Metrics of a rollout and of an evaluation, as they are logged."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from miles.core.flags.cluster import Cluster
from miles.core.flags.logging import Logging
from miles.core.flags.reward import Reward
from miles.core.types.batch import RolloutBatch
from miles.core.types.rollout import EvalResult, RolloutFnEvalOutput
from miles.core.types.sample import Sample, Status
from miles.rollout import metrics
from miles.rollout.flags import Engines, Rollout
from miles.rollout.hooks import Hooks
from miles.rollout.staleness import staleness_metrics
from miles.rollout.tools.metrics import tool_metrics

if TYPE_CHECKING:
    from miles.core.config import Config

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True)
class Reporter:
    """Computes metrics; ``args`` is what the log hooks get.  ``scored``: rewards mean something."""

    config: Config
    args: Any
    hooks: Hooks
    scored: bool = True

    def rollout(
        self, rollout_id: int, samples: list[Sample], batch: RolloutBatch, extra: Metrics, seconds: float
    ) -> Metrics:
        """``rollout/*`` and ``perf/*`` of one rollout.  ``extra`` comes from the rollout function and the rewards."""
        hook = self.hooks.rollout_log
        if hook is not None and hook(rollout_id, self.args, samples, extra, seconds):
            return {}
        logging = self.config[Logging]
        reward_key = self.config[Reward].reward_key
        found = _prefixed("rollout", metrics.sample_metrics(samples, category_key=logging.log_reward_category))
        found |= _batch_metrics(batch) | _prefixed("rollout", tool_metrics(samples))
        found |= _prefixed("rollout", staleness_metrics(samples, rollout_id))
        if self.scored:
            found |= _prefixed("rollout", metrics.zero_std(samples, reward_key))
            found["rollout/raw_reward"] = statistics.fmean(batch.raw_rewards)
            found["rollout/rewards"] = statistics.fmean(batch.rewards)
            if logging.log_passrate:
                found |= _prefixed("passrate", metrics.pass_at_k(samples, reward_key))
            if logging.log_correct_samples:
                found |= metrics.correct_lengths(samples, reward_key)
        if logging.log_multi_turn:
            limit = self.config[Rollout].rollout_max_response_len
            found |= _prefixed("multi_turn", metrics.multi_turn_metrics(samples, limit))
        found |= _prefixed("perf", metrics.throughput(samples, seconds, self._num_devices()))
        return found | extra | {"perf/rollout_time": seconds}

    def evaluation(self, rollout_id: int, output: RolloutFnEvalOutput) -> Metrics:
        """``eval/*`` of one evaluation."""
        hook = self.hooks.eval_log
        data = {
            name: {"rewards": result.rewards, "truncated": result.truncated, "samples": result.samples}
            for name, result in output.data.items()
        }
        if hook is not None and hook(rollout_id, self.args, data, output.metrics):
            return {}
        found = dict(output.metrics)
        for name, result in output.data.items():
            found |= self._dataset(name, result)
        return found

    def _dataset(self, name: str, result: EvalResult) -> Metrics:
        reward_key = self.config[Reward].eval_reward_key
        scored = [sample for sample in result.samples if sample.status is not Status.FAILED]
        found: Metrics = {f"eval/{name}": statistics.fmean(result.rewards)}
        if result.truncated:
            found[f"eval/{name}-truncated_ratio"] = statistics.fmean(map(float, result.truncated))
        if failed := len(result.samples) - len(scored):
            found[f"eval/{name}-failed_ratio"] = failed / len(result.samples)
        if self.config[Logging].log_passrate or any(len(group) > 1 for group in metrics.by_group(scored)):
            found |= {f"eval/{name}-{k}": value for k, value in metrics.pass_at_k(scored, reward_key).items()}
        category = self.config[Logging].log_reward_category
        found |= _prefixed(f"eval/{name}", tool_metrics(scored))
        return found | _prefixed(f"eval/{name}", metrics.sample_metrics(scored, category_key=category))

    def _num_devices(self) -> int:
        return self.config[Cluster].rollout_num_gpus or self.config[Engines].rollout_num_engines


def _batch_metrics(batch: RolloutBatch) -> Metrics:
    return {
        "rollout/response_lengths": statistics.fmean(batch.response_lengths),
        "rollout/total_lengths": statistics.fmean(batch.total_lengths),
        "rollout/truncated": statistics.fmean(map(float, batch.truncated)),
    }


def _prefixed(prefix: str, found: Metrics) -> Metrics:
    return {f"{prefix}/{name}": value for name, value in found.items()}

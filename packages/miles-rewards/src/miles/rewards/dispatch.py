"""The rewards of a run: which type scores which sample, and what a failure means."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from miles.core.errors import ConfigError, RewardError
from miles.core.flags.reward import Reward
from miles.core.flags.system import System
from miles.core.protocols.reward import RewardOutcome
from miles.core.types.sample import Sample
from miles.rewards.catalogue import Catalogue
from miles.rewards.checks import problems
from miles.rewards.context import Context, Settings
from miles.rewards.custom import CustomScorer
from miles.rewards.flags import RewardExecution
from miles.rewards.ledger import Ledger
from miles.rewards.scorer import Scorer, score_all
from miles.rewards.senders import DEFAULT_SENDERS
from miles.rewards.verdict import entry_of, failed

if TYPE_CHECKING:
    from miles.core.config import Config

_LOG = logging.getLogger(__name__)


class Dispatcher:
    """Scores samples as the reward flags say.  See ``miles.core.protocols.reward.RewardDispatcher``."""

    wants_type = True
    """A sample without a reward type is an error, so a run may look for one before it starts."""

    def __init__(self, config: Config) -> None:
        if found := self.check(config):
            raise ConfigError(*found)
        self._flags = config[Reward]
        self._execution = config[RewardExecution]
        self._context = Context(settings_of(config))
        self._catalogue = Catalogue(self._context)
        self._scorers: dict[str, Scorer] = {}
        self._custom: CustomScorer | None = None
        self._usual: Scorer | None = None
        if self._flags.custom_rm_path:
            self._custom = self._catalogue.custom(self._flags.custom_rm_path)
        elif self._flags.rm_type:
            self._usual = self._scorer_of(self._flags.rm_type)
        self._ledgers = {False: Ledger("rollout/reward"), True: Ledger("eval/reward")}
        self._failures_in_a_row = 0
        self._num_replaced = 0
        self._plain = not self._execution.rm_failure_values
        """Whether a number that is a verdict stays as it is."""

    @staticmethod
    def check(config: Config) -> list[str]:
        return list(problems(config))

    async def start(self) -> None:
        await asyncio.to_thread(self._context.start)

    async def score(self, sample: Sample, *, evaluation: bool = False) -> RewardOutcome:
        if self._custom is not None and self._flags.group_rm:
            return (await self.score_group([sample], evaluation=evaluation))[0]
        outcome = await (self._custom or self._scorer_for(sample)).score(sample)
        return self._settle(outcome, sample, evaluation)

    async def score_group(self, samples: Sequence[Sample], *, evaluation: bool = False) -> list[RewardOutcome]:
        if self._custom is not None and self._flags.group_rm:
            outcomes = await self._custom.score_group(samples)
        else:
            outcomes = await self._score_all(samples)
        return [self._settle(outcome, sample, evaluation) for outcome, sample in zip(outcomes, samples, strict=True)]

    async def _score_all(self, samples: Sequence[Sample]) -> list[RewardOutcome]:
        common = self._custom or self._usual
        if common is not None and (
            common is self._custom or not any("rm_type" in sample.metadata for sample in samples)
        ):
            return await score_all(common, samples)
        scorers = [self._scorer_for(sample) for sample in samples]
        if len(set(map(id, scorers))) == 1:
            return await score_all(scorers[0], samples)
        return await asyncio.gather(*(scorer.score(sample) for scorer, sample in zip(scorers, samples)))

    def metrics(self, *, evaluation: bool = False) -> dict[str, float]:
        metrics = self._ledgers[evaluation].report()
        if metrics and not evaluation:
            replaced = self._context.num_replaced
            metrics["rollout/reward/workers_replaced"] = float(replaced - self._num_replaced)
            self._num_replaced = replaced
        return metrics

    async def close(self) -> None:
        for scorer in self._scorers.values():
            await scorer.close()
        await asyncio.to_thread(self._context.close)

    def _scorer_for(self, sample: Sample) -> Scorer:
        own = sample.metadata.get("rm_type")
        if own is None and self._usual is not None:
            return self._usual
        rm_type = own.strip() if isinstance(own, str) and own.strip() else self._flags.rm_type
        if rm_type is None:
            raise ConfigError(
                f"sample {sample.index} has no reward type: set --rm-type or --custom-rm-path, or give its prompt "
                'metadata["rm_type"]'
            )
        return self._scorer_of(rm_type)

    def _scorer_of(self, rm_type: str) -> Scorer:
        scorer = self._scorers.get(rm_type)
        if scorer is None:
            scorer = self._scorers[rm_type] = self._catalogue.scorer(rm_type)
        return scorer

    def _settle(self, outcome: RewardOutcome, sample: Sample, evaluation: bool) -> RewardOutcome:
        """Count the outcome, and give a failure the meaning the flags say."""
        if self._plain and outcome.score.__class__ is float and not outcome.failed:
            self._ledgers[evaluation].add(outcome)
            self._failures_in_a_row = 0
            return outcome
        key = self._flags.eval_reward_key if evaluation else self._flags.reward_key
        outcome = self._valued(_with_number(outcome, key), key)
        if isinstance(outcome.score, dict) and (key is None or key not in outcome.score):
            flag = "--eval-reward-key" if evaluation else "--reward-key"
            raise ConfigError(
                f"{flag} is {key!r}, but rewards are mappings with the entries "
                f"{', '.join(map(repr, outcome.score)) or 'none'}. Set it to one of them"
            )
        self._ledgers[evaluation].add(outcome)
        self._failures_in_a_row = self._failures_in_a_row + 1 if outcome.failed else 0
        if outcome.failed:
            self._react(outcome, sample)
            return outcome._replace(masked=self._execution.rm_failure_action == "mask" and not evaluation)
        return outcome

    def _valued(self, outcome: RewardOutcome, key: str | None) -> RewardOutcome:
        value = self._execution.rm_failure_values.get(outcome.category)
        if isinstance(outcome.score, dict):
            return outcome if value is None or key is None else outcome._replace(score={**outcome.score, key: value})
        if value is not None:
            outcome = outcome._replace(score=value)
        # A user's function that returns mappings failed: its reward has the entry that is trained on.
        if outcome.failed and key is not None and self._custom is not None:
            return outcome._replace(score={key: outcome.score})
        return outcome

    def _react(self, outcome: RewardOutcome, sample: Sample) -> None:
        if self._failures_in_a_row == 1:
            _LOG.warning("sample %s could not be graded (%s): %s", sample.index, outcome.category, outcome.detail)
        if self._execution.rm_failure_action == "raise":
            raise RewardError(
                f"sample {sample.index} could not be graded ({outcome.category}): {outcome.detail}. "
                "--rm-failure-action raise ends the run here"
            )
        limit = self._execution.rm_max_consecutive_failures
        if limit and self._failures_in_a_row >= limit:
            raise RewardError(
                f"{self._failures_in_a_row} gradings in a row failed, the last one, of sample {sample.index}, with "
                f"{outcome.category}: {outcome.detail}. The limit is --rm-max-consecutive-failures {limit}"
            )


def _with_number(outcome: RewardOutcome, key: str | None) -> RewardOutcome:
    """``outcome``, or the failure that it is when the entry to train on is there but no number."""
    score = outcome.score
    if not isinstance(score, dict) or key is None or key not in score or entry_of(score, key) is not None:
        return outcome
    detail = f"the reward's entry {key!r} is {score[key]!r}; it must be a number"
    return failed("bad_score", detail[:300], {**score, key: 0.0}, outcome.seconds)


def settings_of(config: Config) -> Settings:
    """What the reward types of a run want to know."""
    execution, reward = config[RewardExecution], config[Reward]
    return Settings(
        num_workers=execution.rm_num_workers or None,
        timeout_s=execution.rm_timeout,
        concurrency=execution.rm_concurrency,
        strict_upstream=execution.rm_strict_upstream,
        url=reward.rm_url,
        http_proxy=config[System].http_proxy,
        num_senders=(execution.rm_num_workers or DEFAULT_SENDERS) if config[System].use_distributed_post else 0,
        # Flags of miles-rollout, which is there in every run but not where this package is used alone.
        seed=config.rollout_seed if "rollout_seed" in config else 0,
        max_response_len=config.rollout_max_response_len if "rollout_max_response_len" in config else None,
        overlong_buffer_len=execution.rm_overlong_buffer_len,
        reward_key=reward.reward_key,
        args=config,
    )

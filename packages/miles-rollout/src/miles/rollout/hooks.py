"""Users' functions that the rollout side calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from miles.core.errors import MilesError, RolloutError
from miles.core.flags.reward import Reward
from miles.core.registry import Registry, load_object
from miles.core.types.hooks import (
    AllSamplesProcess,
    ConvertSamples,
    DynamicFilter,
    EvalLog,
    RewardPostProcess,
    RolloutLog,
    RolloutSampleFilter,
)
from miles.core.types.rollout import DynamicFilterOutput
from miles.core.types.sample import Group
from miles.rollout.flags import Rollout, Sampling

if TYPE_CHECKING:
    from miles.core.config import Config

FILTERS = Registry("miles.filters")


@dataclass(frozen=True, slots=True)
class Hooks:
    """The hooks that were given, loaded once."""

    dynamic_filter: DynamicFilter | None = None
    sample_filter: RolloutSampleFilter | None = None
    all_samples: AllSamplesProcess | None = None
    reward_post_process: RewardPostProcess | None = None
    convert: ConvertSamples | None = None
    rollout_log: RolloutLog | None = None
    eval_log: EvalLog | None = None

    @classmethod
    def load(cls, config: Config) -> Hooks:
        """Import every hook that a flag names; PluginError says which cannot be."""
        sampling, rollout, reward = config[Sampling], config[Rollout], config[Reward]
        filter_name = sampling.dynamic_sampling_filter_path
        return cls(
            dynamic_filter=_named("--dynamic-sampling-filter-path", filter_name, FILTERS.get),
            sample_filter=_named("--rollout-sample-filter-path", sampling.rollout_sample_filter_path),
            all_samples=_named("--rollout-all-samples-process-path", sampling.rollout_all_samples_process_path),
            reward_post_process=_named("--custom-reward-post-process-path", reward.custom_reward_post_process_path),
            convert=_named(
                "--custom-convert-samples-to-train-data-path", reward.custom_convert_samples_to_train_data_path
            ),
            rollout_log=_named("--custom-rollout-log-function-path", rollout.custom_rollout_log_function_path),
            eval_log=_named("--custom-eval-rollout-log-function-path", rollout.custom_eval_rollout_log_function_path),
        )

    async def judge(self, args: Any, group: Group) -> DynamicFilterOutput:
        """The dynamic filter's verdict; keep everything without one."""
        if self.dynamic_filter is None:
            return DynamicFilterOutput(True)
        verdict = await asyncio.to_thread(self.dynamic_filter, args, group)
        return verdict if isinstance(verdict, DynamicFilterOutput) else DynamicFilterOutput(bool(verdict))


@dataclass(frozen=True, slots=True)
class NamedHook:
    """A user's function whose errors say which flag named it.  Called exactly like the function."""

    function: Any
    flag: str
    path: str

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        try:
            return self.function(*arguments, **keywords)
        except MilesError:
            raise
        except Exception as error:
            raise RolloutError(f"{self.flag} {self.path} raised {type(error).__name__}: {error}") from error


def _named(flag: str, path: str | None, load: Callable[[str], Any] = load_object) -> Any:
    return NamedHook(load(path), flag, path) if path else None

"""What a run's first prompt shows to be missing, before an engine starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles.core.errors import ConfigError
from miles.core.flags.reward import Reward
from miles.rollout.derive import BUFFER_ROLLOUT, FULLY_ASYNC_ROLLOUTS, OWN_ROLLOUTS, SFT_ROLLOUTS
from miles.rollout.flags import Rollout

if TYPE_CHECKING:
    from miles.core.config import Config

_SAMPLING = {*OWN_ROLLOUTS, *FULLY_ASYNC_ROLLOUTS} - {*SFT_ROLLOUTS, BUFFER_ROLLOUT, "buffer_service"}
"""Rollout functions whose samples come without a reward."""


def check_first_prompt(config: Config, source: Any, dispatcher: Any) -> None:
    """ConfigError when nothing can reward its responses: no flag, no function of the user's, nor the prompt itself.

    A ``dispatcher`` class with ``wants_type`` needs to be told.
    """
    reward, rollout, dataset = config[Reward], config[Rollout], getattr(source, "dataset", None)
    named = reward.rm_type or reward.custom_rm_path or rollout.custom_generate_function_path
    if named or not dataset or rollout.rollout_function_path not in _SAMPLING:
        return
    wants_type = getattr(dispatcher, "wants_type", False)
    if wants_type and not {"rm_type", "generate_function_path"} & {*dataset[0].metadata}:
        raise ConfigError(
            "nothing rewards the responses. Give --rm-type (`miles-rewards types` lists the names), --custom-rm-path, "
            'or metadata["rm_type"] with every prompt'
        )

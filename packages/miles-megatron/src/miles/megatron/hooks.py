"""Functions of the user's that look at, or change, the model of a rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from miles.core.flags.hooks import Hooks
from miles.core.registry import load_object

if TYPE_CHECKING:
    from miles.core.config import Config


def run_init_hook(config: Config) -> None:
    """``--custom-megatron-init-path``: ``(args)``, after the process groups are there."""
    path = config[Hooks].custom_megatron_init_path
    if path is not None:
        load_object(path)(config)


def log_prob_hook(config: Config, prefix: str) -> Callable[[Sequence[nn.Module]], None] | None:
    """``--custom-megatron-before-log-prob-hook-path``: ``(args, model, store_prefix)``, before every scoring pass."""
    path = config[Hooks].custom_megatron_before_log_prob_hook_path
    if path is None:
        return None
    function = load_object(path)
    return lambda chunks: function(config, chunks, prefix)


class TrainStepHook:
    """``--custom-megatron-before-train-step-hook-path``, before every optimizer step.

    ``(args, rollout_id, step_id, model, optimizer, opt_param_scheduler)``; ``step_id`` counts within the rollout.
    """

    def __init__(self, config: Config, path: str) -> None:
        self._config = config
        self._function = load_object(path)
        self._rollout_id = self._step_id = 0

    def begin(self, rollout_id: int) -> None:
        """A new rollout."""
        self._rollout_id, self._step_id = rollout_id, 0

    def __call__(self, chunks: Sequence[nn.Module], optimizer: Any, schedule: Any) -> None:
        self._function(self._config, self._rollout_id, self._step_id, chunks, optimizer, schedule)
        self._step_id += 1


def train_step_hook(config: Config) -> TrainStepHook | None:
    path = config[Hooks].custom_megatron_before_train_step_hook_path
    return None if path is None else TrainStepHook(config, path)

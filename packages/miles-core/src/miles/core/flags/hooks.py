"""Functions of the user's at places that no other group owns, and checks for continuous integration."""

from __future__ import annotations

from typing import Annotated

from miles.core.config.group import Flag, Group

_NO_MEGATRON = "it belongs to the megatron backend, which does not exist yet"
_NO_CI = "the checks of continuous integration do not exist yet"


class Hooks(Group):
    title = "Advanced Developer Hooks and CI"

    custom_megatron_init_path: Annotated[str | None, Flag(path=True, unsupported=_NO_MEGATRON)] = None
    """Dotted path of a function ``(args)`` called when a Megatron rank is initialized."""

    custom_megatron_before_log_prob_hook_path: Annotated[str | None, Flag(path=True, unsupported=_NO_MEGATRON)] = None
    """Dotted path of a function ``(args, model, store_prefix)`` called before log-probabilities are computed."""

    custom_megatron_before_train_step_hook_path: Annotated[str | None, Flag(path=True, unsupported=_NO_MEGATRON)] = None
    """Dotted path of a function ``(args, rollout_id, step_id, model, optimizer, opt_param_scheduler)`` called before
    every optimizer step."""

    ci_test: Annotated[bool, Flag(unsupported=_NO_CI)] = False
    """Check the run's figures while it runs, and fail when they are wrong."""

    ci_kl_checker: Annotated[bool, Flag(spelling="--ci-disable-kl-checker", negates=True, unsupported=_NO_CI)] = True
    """Do not check the KL divergence."""

    ci_metric_checker_key: Annotated[str | None, Flag(unsupported=_NO_CI)] = None
    """Metric that must reach a threshold."""

    ci_metric_checker_threshold: Annotated[float | None, Flag(unsupported=_NO_CI)] = None
    """Least value of that metric."""

    ci_save_grad_norm: Annotated[str | None, Flag(unsupported=_NO_CI)] = None
    """File to write gradient norms to."""

    ci_load_grad_norm: Annotated[str | None, Flag(unsupported=_NO_CI)] = None
    """File of gradient norms to compare with."""

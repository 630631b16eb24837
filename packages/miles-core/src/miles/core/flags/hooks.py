"""Functions of the user's at places that no other group owns, and checks for continuous integration."""

from __future__ import annotations

from typing import Annotated

from miles.core.config.group import Flag, Group


class Hooks(Group):
    title = "Advanced Developer Hooks and CI"

    custom_megatron_init_path: Annotated[str | None, Flag(path=True)] = None
    """Dotted path of a function ``(args)`` called when a Megatron rank is initialized."""

    custom_megatron_before_log_prob_hook_path: Annotated[str | None, Flag(path=True)] = None
    """Dotted path of a function ``(args, model, store_prefix)`` called before log-probabilities are computed."""

    custom_megatron_before_train_step_hook_path: Annotated[str | None, Flag(path=True)] = None
    """Dotted path of a function ``(args, rollout_id, step_id, model, optimizer, opt_param_scheduler)`` called before
    every optimizer step."""

    rollout_data_postprocess_path: Annotated[str | None, Flag(path=True)] = None
    """Dotted path of a function ``(args, data)`` called on every rank when log-probabilities and advantages are known,
    before the first optimizer step. ``data`` holds lists with one entry per sample (``tokens``, ``loss_masks``,
    ``log_probs`` ...); it may change ``advantages`` and ``returns`` in place, alike on every rank."""

    ci_test: bool = False
    """Check the run's figures while it runs, and fail when they are wrong: trainer and engine agree on the mean
    log-probability to 0.03, the first optimizer step of every rollout is on-policy, and policy and reference model are
    equal before training."""

    ci_kl_checker: Annotated[bool, Flag(spelling="--ci-disable-kl-checker", negates=True)] = True
    """With ``--ci-test``, do not check that first steps are on-policy."""

    ci_metric_checker_key: str | None = None
    """Metric of the evaluations that must reach ``--ci-metric-checker-threshold`` before the run ends."""

    ci_metric_checker_threshold: float | None = None
    """Least value of that metric; the run fails when no evaluation reaches it."""

    ci_save_grad_norm: str | None = None
    """File to write the gradient norm of every optimizer step to (JSON); ``{role}``, ``{rollout_id}`` and ``{step_id}``
    are filled in."""

    ci_load_grad_norm: str | None = None
    """Files of gradient norms that this run's must equal to 3 %, as ``--ci-save-grad-norm`` writes them."""

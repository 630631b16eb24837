"""Checks of continuous integration: figures that must hold in a healthy run (``--ci-test``), and gradient norms kept
from run to run (``--ci-save-grad-norm``, ``--ci-load-grad-norm``)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from miles.core.errors import TrainingError
from miles.core.flags.hooks import Hooks
from miles.core.protocols.backend import Role

ON_POLICY_TOLERANCE = 1e-8
"""Of the first step's divergence from the old policy: the same forward pass twice, to rounding."""
ENGINE_TOLERANCE = 0.03
"""Between the mean log-probabilities of trainer and engine, in nats."""
GRAD_NORM_TOLERANCE = 0.03
"""Relative and absolute."""


def check_rollout(rollout_id: int, first_of_run: bool, metrics: Mapping[str, float]) -> None:
    """TrainingError when log-probabilities of trainer, engine and reference model are not what they must be."""
    ours, engines = metrics.get("rollout/log_probs"), metrics.get("rollout/rollout_log_probs")
    if ours is not None and engines is not None and abs(ours - engines) > ENGINE_TOLERANCE:
        _fail(rollout_id, f"mean log-probability {ours:.6g} in the trainer and {engines:.6g} in the engine")
    reference = metrics.get("rollout/ref_log_probs")
    if first_of_run and ours is not None and reference is not None and abs(ours - reference) > ON_POLICY_TOLERANCE:
        _fail(rollout_id, f"mean log-probability {ours:.9g} before training and {reference:.9g} in its reference")


def check_first_step(rollout_id: int, first_of_run: bool, step: Mapping[str, float]) -> None:
    """TrainingError when the first step of a rollout finds the policy elsewhere than it was scored."""
    moved = {name: step[name] for name in ("train/ppo_kl", "train/pg_clipfrac") if abs(step.get(name, 0.0)) > 1e-8}
    if moved:
        _fail(rollout_id, f"the first optimizer step is not on-policy: {moved}")
    if first_of_run and abs(step.get("train/kl_loss", 0.0)) > ON_POLICY_TOLERANCE:
        _fail(rollout_id, f"the divergence from the reference model is {step['train/kl_loss']:.3g} before any training")


class GradNorms:
    """Writes the gradient norms of a rollout's steps, or compares them with those of another run."""

    def __init__(self, flags: Hooks, role: Role) -> None:
        self._save, self._load = flags.ci_save_grad_norm, flags.ci_load_grad_norm
        self._role = role

    def take(self, rollout_id: int, norms: Sequence[float]) -> None:
        """One rank calls it, once per rollout.  TrainingError when a norm differs."""
        for step_id, norm in enumerate(norms):
            if self._save is not None:
                path = self._path(self._save, rollout_id, step_id)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"grad_norm": norm}) + "\n")
            if self._load is not None:
                self._compare(self._path(self._load, rollout_id, step_id), norm)

    def _path(self, pattern: str, rollout_id: int, step_id: int) -> Path:
        return Path(pattern.format(role=self._role, rollout_id=rollout_id, step_id=step_id))

    @staticmethod
    def _compare(path: Path, norm: float) -> None:
        try:
            expected = json.loads(path.read_text())["grad_norm"]
        except (OSError, ValueError, KeyError) as error:
            raise TrainingError(f"--ci-load-grad-norm: {path} cannot be read: {error}") from error
        if not math.isclose(norm, expected, rel_tol=GRAD_NORM_TOLERANCE, abs_tol=GRAD_NORM_TOLERANCE):
            raise TrainingError(f"--ci-load-grad-norm: the norm of the gradient is {norm:.6g}, {path} says {expected}")


def _fail(rollout_id: int, what: str) -> None:
    raise TrainingError(f"--ci-test: rollout {rollout_id}: {what}")

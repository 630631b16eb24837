"""When evaluation and saving are due.  ``done`` counts the rollouts that were trained on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Schedule:
    """Pure function of the counters, so that a resumed run does what the uninterrupted one would have done."""

    num_rollout: int
    per_epoch: int | None = None
    """Rollouts in an epoch when the run is counted in epochs; their ends trigger too."""
    eval_interval: int | None = None
    eval_before_train: bool = True
    save_interval: int | None = None
    saves: bool = False
    update_interval: int = 1
    """Rollouts between two weight updates of the engines."""

    def updates_weights(self, done: int) -> bool:
        """Whether the engines get the weights that ``done`` rollouts have trained.

        With every checkpoint they do, so that a run that starts there generates with what the uninterrupted one does.
        """
        at_end = done == self.num_rollout
        return at_end or done % self.update_interval == 0 or self.evaluates(done) or self.saves_after(done)

    def evaluates(self, done: int) -> bool:
        """Whether to evaluate what ``done`` rollouts have trained: before them, every interval, and at the end."""
        if self.eval_interval is None:
            return False
        if done == 0:
            return self.eval_before_train
        return done == self.num_rollout or self._triggers(done, self.eval_interval)

    def saves_after(self, done: int) -> bool:
        """Whether to save when ``done`` rollouts have been trained on: every interval, and at the end."""
        if not self.saves or done == 0:
            return False
        return done == self.num_rollout or self._triggers(done, self.save_interval)

    def _triggers(self, done: int, interval: int | None) -> bool:
        at_interval = interval is not None and done % interval == 0
        return at_interval or (self.per_epoch is not None and done % self.per_epoch == 0)

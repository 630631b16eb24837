"""The algorithm of a run: what every line does is in ``job``."""

from __future__ import annotations

from miles.core.driver.job import Job


def run(job: Job) -> None:
    """Train from where the run stands to its last rollout.

    The weight version is the number of rollouts trained on.  What happens at which count is a function of the count, so
    a resumed run goes through the same versions, evaluations and saves as one that was never interrupted.
    Asynchronous training differs in one line: the next rollout is begun before this one is trained on.
    """
    for rollout_id in job.remaining_rollouts():
        job.update_weights_if_due(version=rollout_id)
        job.evaluate_if_due(done=rollout_id)
        rollout = job.generate(rollout_id)
        job.generate_ahead(rollout_id + 1)
        report = job.train(rollout)
        job.record(rollout_id, rollout, report)
        job.save_if_due(done=rollout_id + 1)
    job.update_weights_if_due(version=job.num_rollout)
    job.evaluate_if_due(done=job.num_rollout)
    job.settle()


def run_rollout_only(job: Job) -> None:
    """Generate, evaluate and record, without a trainer (``--debug-rollout-only``)."""
    for rollout_id in job.remaining_rollouts():
        job.evaluate_if_due(done=rollout_id)
        job.record(rollout_id, job.generate(rollout_id), None)
        job.settle()

"""A rollout function that generates all the time: engines work while the trainer does, and while weights change."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from miles.core.protocols.rollout import DataSource
from miles.core.types.rollout import RolloutFnEvalOutput, RolloutFnTrainOutput
from miles.rollout.evaluate import evaluate
from miles.rollout.progress import Progress
from miles.rollout.sglang_rollout import finish_groups
from miles.rollout.staleness import staleness_metrics
from miles.rollout.stream import Stream, StreamLimits, StreamSteps, Taken

if TYPE_CHECKING:
    from miles.rollout.runtime import Runtime


def generate_rollout_fully_async(
    args: Any, rollout_id: int, data_source: DataSource, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """The oldest ``--rollout-batch-size`` groups that are finished, in order of index, or an evaluation.

    Generation goes on when this returns.  A group that was made by weights older than ``--max-weight-staleness`` allows
    is made again or dropped.  Raises RolloutError when too many groups fail or are dropped by the dynamic filter.
    """
    runtime: Runtime = args.runtime
    if evaluation:
        return runtime.run(evaluate(runtime))
    return runtime.run(_rollout(runtime, rollout_id, data_source))


generate_rollout_fully_async.continuous = True  # type: ignore[attr-defined]


async def _rollout(runtime: Runtime, rollout_id: int, data_source: DataSource) -> RolloutFnTrainOutput:
    args, progress = runtime.args, runtime.progress
    if runtime.stream is None:
        runtime.stream = open_stream(runtime, data_source)
    stream, per_group = runtime.stream, args.n_samples_per_prompt
    progress.begun = args.rollout_batch_size * per_group

    def tell(taken: int) -> None:
        progress.finished = taken * per_group

    taken = await stream.take(args.rollout_batch_size, rollout_id, tell)
    groups = await finish_groups(runtime, taken.groups, taken.dropped, data_source)
    samples = [sample for group in groups for sample in group]
    metrics = {f"rollout/fully_async/{name}": value for name, value in _stream_metrics(stream, taken).items()}
    metrics |= {f"rollout/fully_async/{name}": value for name, value in staleness_metrics(samples, rollout_id).items()}
    metrics |= {f"rollout/dynamic_filter/drop_{reason}": count for reason, count in taken.drops.items()}
    return RolloutFnTrainOutput(groups, metrics | stream.progress.collect())


def open_stream(runtime: Runtime, data_source: DataSource) -> Stream:
    """The stream of a run, over its data source and engines."""
    args, progress = runtime.args, Progress()
    worker, params = replace(runtime.worker(), progress=progress), runtime.settings.params()
    steps = StreamSteps(
        draw=lambda count: asyncio.to_thread(data_source.get_samples, count),
        give_back=lambda groups: asyncio.to_thread(data_source.add_samples, groups),
        run=lambda group: worker.run(group, params),
        judge=lambda group: runtime.hooks.judge(args, group),
        version=lambda: runtime.weight_version,
    )
    return Stream(steps, _limits(args), progress)


def _limits(args: Any) -> StreamLimits:
    batch, bound = args.rollout_batch_size, args.max_weight_staleness
    in_work = batch
    if args.async_max_concurrent_samples is not None:
        in_work = max(1, args.async_max_concurrent_samples // args.n_samples_per_prompt)
    outstanding = in_work + int(args.async_data_buffer_capacity_factor * batch)
    if bound is not None:
        # Each update of the weights takes a batch away; what is begun behind so many batches would be too old.
        outstanding = min(outstanding, bound * batch)
    return StreamLimits(
        in_work=in_work,
        outstanding=max(outstanding, batch),
        max_groups=batch * args.dynamic_sampling_max_rounds,
        max_staleness=bound,
        retry_stale=args.async_unused_samples_handler == "retry",
    )


def _stream_metrics(stream: Stream, taken: Taken) -> dict[str, float]:
    waiting = [sample for group in stream.finished for sample in group]
    return {
        "queue_size": len(stream.finished),
        "queue_tokens": sum(sample.response_length for sample in waiting),
        "in_flight_groups": stream.num_running,
        "stale_groups_filtered": taken.stale,
        "failed_groups": taken.failures.total(),
    }

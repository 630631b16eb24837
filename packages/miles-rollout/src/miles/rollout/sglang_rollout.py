"""The default rollout function: sample, score, filter, over any engine that speaks SGLang's protocol."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from miles.core.protocols.rollout import DataSource
from miles.core.types.rollout import RolloutFnEvalOutput, RolloutFnTrainOutput
from miles.core.types.sample import Group
from miles.rollout.collect import Collected, Collector, Limits, Steps
from miles.rollout.evaluate import evaluate

if TYPE_CHECKING:
    from miles.rollout.runtime import Runtime


def generate_rollout(
    args: Any, rollout_id: int, data_source: DataSource, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """``--rollout-batch-size`` finished groups in order of index, or the evaluation of every data set.

    Raises RolloutError when too many groups fail or are dropped by the dynamic filter.
    """
    runtime: Runtime = args.runtime
    if evaluation:
        return runtime.run(evaluate(runtime))
    return runtime.run(_train_rollout(runtime, rollout_id, data_source))


async def _train_rollout(runtime: Runtime, rollout_id: int, data_source: DataSource) -> RolloutFnTrainOutput:
    collected = await _collect(runtime, data_source)
    if collected.surplus:
        if runtime.args.partial_rollout:
            _stamp(collected.surplus, rollout_id)
        await asyncio.to_thread(data_source.add_samples, collected.surplus)
    groups = await finish_groups(runtime, collected.groups, collected.dropped, data_source)
    return RolloutFnTrainOutput(groups, _metrics(collected) | runtime.progress.collect())


async def finish_groups(
    runtime: Runtime, kept: list[Group], dropped: list[Group], data_source: DataSource
) -> list[Group]:
    """The kept groups in order of index, after the hooks that see whole rollouts."""
    groups, hooks = sorted(kept, key=_first_index), runtime.hooks
    if hooks.sample_filter is not None:
        await asyncio.to_thread(hooks.sample_filter, runtime.args, groups)
    if hooks.all_samples is not None:
        finished = sorted(kept + dropped, key=_first_index)
        await asyncio.to_thread(hooks.all_samples, runtime.args, finished, data_source)
    return groups


async def _collect(runtime: Runtime, data_source: DataSource) -> Collected:
    args = runtime.args
    worker, params = runtime.worker(), runtime.settings.params()
    steps = Steps(
        draw=lambda count: asyncio.to_thread(data_source.get_samples, count),
        run=lambda group: worker.run(group, params),
        judge=lambda group: runtime.hooks.judge(args, group),
        abort=runtime.abort,
    )
    limits = Limits(
        target=args.rollout_batch_size,
        wave=args.over_sampling_batch_size,
        max_groups=args.rollout_batch_size * args.dynamic_sampling_max_rounds,
    )
    may_drop = runtime.hooks.dynamic_filter is not None
    try:
        return await Collector(steps, limits, partial=args.partial_rollout, may_drop=may_drop).collect()
    finally:
        runtime.resume()


def _stamp(groups: list[Group], rollout_id: int) -> None:
    """Remember in which rollout a response was begun."""
    for group in groups:
        for sample in group:
            if sample.response_length:
                sample.metadata.setdefault("start_rollout_id", rollout_id)


def _metrics(collected: Collected) -> dict[str, float]:
    metrics: dict[str, float] = {
        f"rollout/dynamic_filter/drop_{reason}": count for reason, count in collected.drops.items()
    }
    if collected.failures:
        metrics["rollout/failed_groups"] = collected.failures.total()
    return metrics


def _first_index(group: Group) -> int:
    return group[0].index or 0

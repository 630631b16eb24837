"""Evaluation: every prompt of every data set, each time with the same seeds."""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING

from miles.core.errors import EngineError
from miles.core.types.rollout import EvalResult, RolloutFnEvalOutput
from miles.core.types.sample import Group, Sample, Status
from miles.rollout.data import Prompt, PromptDataset
from miles.rollout.eval_datasets import EvalDataset
from miles.rollout.group_task import GroupWorker, failure

if TYPE_CHECKING:
    from miles.rollout.runtime import Runtime


async def evaluate(runtime: Runtime) -> RolloutFnEvalOutput:
    """Responses and rewards of all data sets, which run at the same time."""
    worker = runtime.worker(evaluation=True)
    names = [spec.name for spec, _ in runtime.eval_data]
    key = runtime.args.eval_reward_key
    results = await asyncio.gather(*(_evaluate_one(worker, spec, data, key) for spec, data in runtime.eval_data))
    return RolloutFnEvalOutput(dict(zip(names, results, strict=True)))


async def _evaluate_one(
    worker: GroupWorker, spec: EvalDataset, data: PromptDataset, reward_key: str | None
) -> EvalResult:
    groups = [_group(spec, data[index], index) for index in range(len(data))]
    params = spec.settings.params()
    finished = await asyncio.gather(*(worker.run(group, params, "eval") for group in groups))
    samples = sorted((sample for group in finished for sample in group), key=lambda sample: sample.index or 0)
    scored = [sample for sample in samples if sample.status is not Status.FAILED]
    if not scored:
        raise EngineError(f"evaluation data set {spec.name!r}: every sample failed; the first: {failure(samples)}")
    return EvalResult(
        rewards=[sample.reward_value(reward_key) for sample in scored],
        truncated=[sample.status is Status.TRUNCATED for sample in scored],
        samples=samples,
    )


def _group(spec: EvalDataset, prompt: Prompt, number: int) -> Group:
    metadata = {**prompt.metadata, **spec.metadata_overrides}
    if spec.rm_type is not None:
        metadata["rm_type"] = spec.rm_type
    return [
        Sample(
            group_index=number,
            index=number * spec.num_samples + repeat,
            prompt=prompt.text,
            label=prompt.label,
            metadata=copy.deepcopy(metadata),
            multimodal_inputs=copy.deepcopy(prompt.media),
            generate_function_path=spec.generate_function_path,
        )
        for repeat in range(spec.num_samples)
    ]

"""Rollouts from a rollout buffer service (``--rollout-buffer-url``): a server that makes trajectories on its own.

Protocol, JSON over HTTP:

- ``POST /start_rollout``: once per start of the run, with where the engines' router is, the prompt file, how to sample,
  and ``skip_instance_ids``, the prompts that were trained on or are held already;
- ``POST /get_rollout_data``: ``{"success": true, "data": {"data": [record, ...], "meta_info": {...}}}``, each record
  once; ``success`` is false while there are none.

A record has ``instance_id`` (of its prompt), ``reward``, ``messages`` or token ids, and ``extra_info``, which becomes
the sample's metadata.  Token ids are what an engine sampled, so that nothing is tokenized again: ``tokens`` (prompt and
response), ``response_length``, and where known ``loss_mask`` and ``rollout_log_probs`` of the response, and
``weight_version``.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from miles.core.errors import ConfigError, DataError, EngineError, RolloutError
from miles.core.types.rollout import RolloutFnEvalOutput, RolloutFnTrainOutput
from miles.core.types.sample import Group, Sample, Status
from miles.rollout import sft_rollout
from miles.rollout.data_source import RolloutDataSourceWithBuffer
from miles.rollout.evaluate import evaluate
from miles.rollout.http import JsonClient
from miles.rollout.loss_mask import LossMasks
from miles.rollout.sglang_rollout import finish_groups

if TYPE_CHECKING:
    from miles.rollout.runtime import Runtime

logger = logging.getLogger(__name__)

Record = dict[str, Any]

FETCH_INTERVAL_S = 0.5
REQUEST_DEADLINE_S = 120.0
ATTEMPTS = 5
"""Of one request, over a few seconds: a service may be starting."""
_TRAINED = "instance_ids"
"""Entry of the data source's metadata: prompts that were trained on."""


def generate_rollout(
    args: Any, rollout_id: int, data_source: RolloutDataSourceWithBuffer, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """Complete groups of the service's records: ``--rollout-batch-size`` of them, or what
    ``--min-batch-collection-ratio`` is content with.  Groups beyond that wait in the data source for the next rollout.

    Raises RolloutError when the service fails more than ``--fetch-trajectory-retry-times`` in a row.
    """
    runtime: Runtime = args.runtime
    if evaluation:
        return runtime.run(evaluate(runtime))
    return runtime.run(_rollout(runtime, data_source))


async def _rollout(runtime: Runtime, source: RolloutDataSourceWithBuffer) -> RolloutFnTrainOutput:
    args = runtime.args
    if runtime.feed is None:
        runtime.feed = Feed(args, LossMasks(runtime.state.text, args.loss_mask_type))
        await runtime.feed.start(_known(source))
    held = source.get_samples(min(args.rollout_batch_size, source.get_buffer_length()))
    least = math.ceil(args.min_batch_collection_ratio * args.rollout_batch_size) - len(held)
    fetched = await runtime.feed.collect(least, runtime.progress) if least > 0 else []
    groups = held + [runtime.feed.fill(source.get_samples(1)[0], records) for records in fetched]
    kept, surplus = groups[: args.rollout_batch_size], groups[args.rollout_batch_size :]
    source.add_samples(surplus)
    source.metadata.setdefault(_TRAINED, []).extend(_instance(group) for group in kept)
    return RolloutFnTrainOutput(await finish_groups(runtime, kept, [], source))


class Feed:
    """The service, seen from the run."""

    def __init__(self, args: Any, masks: LossMasks) -> None:
        self._args, self._masks = args, masks
        self._client = JsonClient(args.rollout_buffer_url, deadline_s=REQUEST_DEADLINE_S, attempts=ATTEMPTS)
        self._partial: dict[str, list[Record]] = defaultdict(list)
        """Records of prompts that do not have all of theirs yet."""

    async def start(self, known: list[str]) -> None:
        """Tell the service what to do; EngineError when it does not listen."""
        args = self._args
        sampling = {
            "max_tokens": args.rollout_max_response_len,
            "temperature": args.rollout_temperature,
            "top_p": args.rollout_top_p,
        }
        await self._client.post(
            "/start_rollout",
            {
                "task_type": args.rollout_task_type,
                "input_file": args.prompt_data,
                "num_repeat_per_sample": str(args.n_samples_per_prompt),
                "num_epoch": str(args.num_epoch or 1),
                "remote_engine_url": f"http://{args.sglang_router_ip}:{args.sglang_router_port}",
                "remote_buffer_url": args.rollout_buffer_url,
                "tokenizer_path": args.hf_checkpoint,
                "max_tokens": str(args.rollout_max_response_len),
                "sampling_params": sampling,
                "skip_instance_ids": known,
            },
        )

    async def collect(self, count: int, progress: Any) -> list[list[Record]]:
        """At least ``count`` complete groups of records."""
        groups: list[list[Record]] = []
        failures = 0
        progress.begun = count * self._args.n_samples_per_prompt
        while len(groups) < count:
            try:
                answer = await self._client.post("/get_rollout_data", {})
                failures = 0
            except EngineError as error:
                failures += 1
                self._give_up_after(failures, error)
                continue
            records = _records(answer)
            groups += self._completed(records)
            progress.finished = len(groups) * self._args.n_samples_per_prompt
            if len(groups) < count and not records:
                await asyncio.sleep(FETCH_INTERVAL_S)
        return groups

    def fill(self, group: Group, records: list[Record]) -> Group:
        """The blank group with what the records say."""
        for sample, record in zip(group, records, strict=True):
            self._fill(sample, record)
        return group

    async def close(self) -> None:
        await self._client.close()

    def _completed(self, records: list[Record]) -> list[list[Record]]:
        """Groups that these records complete."""
        done = []
        for record in records:
            name = str(record["instance_id"])
            self._partial[name].append(record)
            if len(self._partial[name]) == self._args.n_samples_per_prompt:
                done.append(self._partial.pop(name))
        return done

    def _fill(self, sample: Sample, record: Record) -> None:
        sample.metadata = {**(record.get("extra_info") or {}), "instance_id": str(record["instance_id"])}
        if "tokens" in record:
            _take_tokens(sample, record)
        else:
            sample.prompt = record["messages"]
            ((ids, mask),) = self._masks([(record["messages"], None)])
            sft_rollout.fill(sample, ids, mask, self._args.rollout_max_context_len)
        sample.reward = record["reward"]
        cut = sample.metadata.get("finish_reason") == "length" or sample.status is Status.TRUNCATED
        sample.status = Status.TRUNCATED if cut else Status.COMPLETED
        sample.validate()

    def _give_up_after(self, failures: int, error: EngineError) -> None:
        most = self._args.fetch_trajectory_retry_times
        logger.warning("the rollout buffer service gives no trajectories: %s", error)
        if most != -1 and failures > most:
            raise RolloutError(
                f"--rollout-buffer-url {self._args.rollout_buffer_url}: no trajectories after {failures} attempts in a "
                f"row (--fetch-trajectory-retry-times {most}): {error}"
            ) from error


def _take_tokens(sample: Sample, record: Record) -> None:
    sample.tokens, sample.response_length = list(record["tokens"]), int(record["response_length"])
    sample.loss_mask = record.get("loss_mask")
    sample.rollout_log_probs = record.get("rollout_log_probs")
    if (version := record.get("weight_version")) is not None:
        sample.weight_versions = [str(version)]
        sample.token_weight_versions = [int(version)] * sample.response_length if str(version).isdigit() else None


def _records(answer: Any) -> list[Record]:
    if not isinstance(answer, dict) or not answer.get("success"):
        return []
    data = answer.get("data")
    records = data.get("data", []) if isinstance(data, dict) else data
    if not isinstance(records, list):
        raise DataError(f"/get_rollout_data: expected a list of records in data.data, found {type(records).__name__}")
    for record in records:
        missing = {"instance_id", "reward"} - record.keys()
        if missing or not ("messages" in record or "tokens" in record):
            lacks = ", ".join(sorted(missing)) or "messages or tokens"
            raise DataError(f"/get_rollout_data: a record lacks {lacks}: {str(record)[:200]}")
    return records


def _known(source: RolloutDataSourceWithBuffer) -> list[str]:
    """Prompts that the service need not work on."""
    if not isinstance(source, RolloutDataSourceWithBuffer):
        raise ConfigError("--rollout-buffer-url keeps surplus groups in the data source: leave --data-source-path out")
    trained: list[str] = source.metadata.get(_TRAINED, [])
    return trained + [_instance(group) for group in source.buffer]


def _instance(group: Group) -> str:
    return str(group[0].metadata.get("instance_id"))

"""The rollout role: owner of prompts, engines, router and rewards."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles.core.errors import CheckpointError, ConfigError, RolloutError
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.checkpoint import Checkpoint
from miles.core.flags.data import Data
from miles.core.flags.debug import Debug
from miles.core.flags.reward import Reward
from miles.core.protocols.engine import EngineHosts
from miles.core.protocols.reward import RewardDispatcher
from miles.core.protocols.rollout import DataSource, RolloutFn, RolloutResult
from miles.core.registry import Registry
from miles.core.run_directory import RunDirectory
from miles.core.types.batch import RolloutBatch
from miles.core.types.rollout import EvalResult, RolloutFnEvalOutput, RolloutFnTrainOutput
from miles.core.types.sample import Group, Sample
from miles.rollout import convert, metrics
from miles.rollout.collector_pause import full_collections_wait
from miles.rollout.data import PromptDataset, open_dataset
from miles.rollout.data_source import RolloutDataSource
from miles.rollout.engine_options import own_engines
from miles.rollout.eval_datasets import EvalDataset, eval_datasets
from miles.rollout.first_prompt import check_first_prompt
from miles.rollout.flags import Engines, Evaluation, Rollout, RolloutBuffer
from miles.rollout.front import num_answering
from miles.rollout.generate_state import GenerateState, RolloutArgs
from miles.rollout.generators.experts import ExpertShape
from miles.rollout.generators.registry import Generators
from miles.rollout.hooks import Hooks
from miles.rollout.http import JsonClient
from miles.rollout.loop_thread import LoopThread
from miles.rollout.progress import Progress
from miles.rollout.report import Reporter
from miles.rollout.rollout_functions import RolloutFunctions
from miles.rollout.runtime import Runtime
from miles.rollout.samples_file import read_groups, read_samples, write_groups, write_samples
from miles.rollout.sampling import SamplingSettings
from miles.rollout.servers import Servers
from miles.rollout.teacher import TeacherEngine, connect_teacher, start_teacher_engine
from miles.rollout.text import ChatTokenizer, load_tokenizer

if TYPE_CHECKING:
    from miles.core.config import Config

logger = logging.getLogger(__name__)

ROLLOUTS = Registry("miles.rollouts")
DATA_SOURCES = Registry("miles.data_sources")
DISPATCHERS = Registry("miles.reward_dispatchers")

_CLOSE_DEADLINE_S = 10.0
_GROUPS_PER_ENGINE = 4
"""With fewer groups than this, whole groups would load the engines unevenly: their samples go one by one."""
_DATA_STATE = "data_source.json"
_STREAM_STATE = "stream.json"
_ROLE_STATE = "rollout.json"


class RolloutManager:
    """See ``miles.core.protocols.rollout.RolloutRole``.

    A rollout function with the attribute ``needs_engines = False`` (supervised fine-tuning) gets neither engines nor
    rewards, unless evaluation needs them.
    """

    def __init__(self, config: Config, run_dir: Path, hosts: EngineHosts | None = None) -> None:
        self._config = config
        self._files = RunDirectory(run_dir)
        self._args = RolloutArgs(config)
        self._hooks = Hooks.load(config)
        self._replay = config[Debug].load_debug_rollout_data
        self._tokenizer: ChatTokenizer = load_tokenizer(_checkpoint(config))
        self._source = None if self._replay else DATA_SOURCES.get(config[Data].data_source_path)(self._args)
        check_first_prompt(config, self._source, DISPATCHERS.get("default"))
        functions = RolloutFunctions(self._args, self._source, lambda: self._weight_version)
        self._rollout_fn: RolloutFn = functions.adapt(ROLLOUTS.get(config[Rollout].rollout_function_path))
        self._eval_fn: RolloutFn = functions.adapt(ROLLOUTS.get(config[Evaluation].eval_function_path))
        self._weight_version = 0
        self._eval_data = _open_eval_data(config, self._tokenizer) if config[Evaluation].eval_interval else []
        scored = config[Algorithm].loss_type != "sft_loss"
        self._reporter = Reporter(config, self._args, self._hooks, scored=scored)
        self._hosts = hosts
        self._servers = Servers(config, run_dir, hosts)
        self._teacher: TeacherEngine | None = None
        self._runtime: Runtime | None = None
        self._rewards_started: Future[None] | None = None
        self._last_rollout: int | None = None
        self._taken_at: float | None = None

    @staticmethod
    def own_engines(config: Config) -> Sequence[int]:
        return own_engines(config)

    def launch(self) -> None:
        """Start engines and router, and the reward workers; return at once."""
        if not self._needs_engines():
            return
        self._servers.launch()
        self._teacher = start_teacher_engine(self._config, self._files.path, self._hosts)
        self._runtime = self._start_runtime()

    def wait_ready(self) -> None:
        if self._runtime is None:
            return
        self._servers.wait_ready()
        if self._teacher is not None:
            self._teacher.wait_ready()
        if self._rewards_started is not None:
            self._rewards_started.result()

    def generates_continuously(self) -> bool:
        return not self._replay and getattr(self._rollout_fn, "continuous", False)

    def num_rollouts_per_epoch(self) -> int | None:
        dataset = getattr(self._source, "dataset", None)
        return None if dataset is None else len(dataset) // self._config[Data].rollout_batch_size

    def generate(self, rollout_id: int) -> RolloutResult:
        # What generates all the time has worked since the last rollout was taken.
        start = (self.generates_continuously() and self._taken_at) or time.perf_counter()
        output = self._replayed(rollout_id) if self._replay else self._generated(rollout_id)
        self._taken_at = time.perf_counter()
        seconds = self._taken_at - start
        samples = [sample for group in output.samples for sample in group]
        if not samples:
            raise RolloutError(f"--rollout-function-path: rollout {rollout_id} has no samples")
        batch = self._batch(rollout_id, samples)
        extra = output.metrics | self._reward_metrics() | self._servers.metrics()
        metrics = self._reporter.rollout(rollout_id, samples, batch, extra, seconds)
        self._write(rollout_id, samples)
        self._last_rollout = rollout_id
        return RolloutResult(self._trimmed(batch), metrics)

    def evaluate(self, rollout_id: int) -> dict[str, float]:
        output = _as_eval_output(self._call(self._eval_fn, rollout_id, evaluation=True))
        for name, result in output.data.items():
            write_samples(self._files.eval_samples(rollout_id, name), result.samples, self._tokenizer)
        grading = self._reward_metrics(evaluation=True)
        return self._reporter.evaluation(rollout_id, RolloutFnEvalOutput(output.data, output.metrics | grading))

    def progress(self) -> str | None:
        return None if self._runtime is None else self._runtime.progress.text()

    def check_alive(self) -> None:
        self._servers.check_alive()
        if self._teacher is not None:
            self._teacher.check_alive()

    def engine_urls(self) -> list[str]:
        return self._servers.engine_urls

    def engines_waiting(self) -> list[str]:
        return self._servers.waiting_urls

    def weights_updating(self) -> None:
        self._servers.rest()

    def weights_updated(self, version: int, urls: Sequence[str]) -> None:
        self._weight_version = version
        self._servers.wake()
        self._servers.admit(version, urls)
        if self._runtime is not None and set(urls) >= set(self._servers.engine_urls):
            self._runtime.weight_version = version

    def release_memory(self, tags: Sequence[str]) -> int:
        return self._servers.release_memory(tags)

    def resume_memory(self, tags: Sequence[str]) -> None:
        self._servers.resume_memory(tags)

    def replace_engine(self, url: str, reason: str) -> None:
        self._servers.replace(url, reason)

    def save(self, directory: Path) -> None:
        (directory / _ROLE_STATE).write_text(json.dumps({"rollout_id": self._last_rollout}))
        stream = None if self._runtime is None else self._runtime.stream
        if self._runtime is None or stream is None:
            self._save_data(directory, [])
        else:
            self._runtime.run(stream.hold(lambda groups: asyncio.to_thread(self._save_data, directory, groups)))

    def _save_data(self, directory: Path, in_stream: list[Group]) -> None:
        if self._source is None:
            return
        if _keeps_state_in_checkpoint(self._source):
            self._source.save_to(directory / _DATA_STATE)
        elif self._last_rollout is not None:
            self._source.save(self._last_rollout)
        if in_stream:
            write_groups(directory / _STREAM_STATE, in_stream)

    def load(self, directory: Path) -> None:
        try:
            self._last_rollout = json.loads((directory / _ROLE_STATE).read_text())["rollout_id"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{directory / _ROLE_STATE} cannot be read: {error}") from error
        if self._source is None:
            return
        if _keeps_state_in_checkpoint(self._source):
            self._source.load_from(directory / _DATA_STATE)
        elif self._last_rollout is not None:
            self._source.load(self._last_rollout)
        if (directory / _STREAM_STATE).exists():
            self._source.add_samples(read_groups(directory / _STREAM_STATE))

    def stop(self) -> None:
        runtime, self._runtime = self._runtime, None
        with ExitStack() as at_last:
            at_last.callback(self._servers.stop)
            if self._teacher is not None:
                at_last.callback(self._teacher.stop)
            if runtime is not None:
                at_last.callback(runtime.loop.stop)
                try:
                    runtime.loop.run(_close(runtime), _CLOSE_DEADLINE_S)
                except TimeoutError:
                    logger.warning("connections of the rollout were not closed in %.0f s: dropped", _CLOSE_DEADLINE_S)

    def _needs_engines(self) -> bool:
        functions = [self._rollout_fn] if not self._replay else []
        if self._eval_data:
            functions.append(self._eval_fn)
        return any(getattr(function, "needs_engines", True) for function in functions)

    def _start_runtime(self) -> Runtime:
        config, address = self._config, self._servers.router
        rollout, engines = config[Rollout], config[Engines]
        self._args.sglang_router_ip, self._args.sglang_router_port = address.host, address.port
        rewards: RewardDispatcher = DISPATCHERS.get("default")(config)
        client = JsonClient(address.url, deadline_s=engines.sglang_router_request_timeout_secs)
        state = GenerateState(self._args, self._tokenizer, client)
        if config[Algorithm].use_rollout_routing_replay:
            state.experts = ExpertShape.of_checkpoint(_checkpoint(config))
        runtime = Runtime(
            args=self._args,
            loop=LoopThread(),
            state=state,
            generators=Generators(rollout.custom_generate_function_path, self._args),
            hooks=self._hooks,
            rewards=rewards,
            settings=_settings(rollout),
            max_in_flight=engines.sglang_server_concurrency * num_answering(config),
            whole_groups=config[Data].rollout_batch_size >= _GROUPS_PER_ENGINE * num_answering(config),
            eval_data=self._eval_data,
            check_alive=self.check_alive,
            teacher=connect_teacher(config, self._teacher),
            engine_urls=lambda: self._servers.engine_urls,
        )
        self._args.generate_state, self._args.runtime = state, runtime
        self._rewards_started = runtime.loop.submit(rewards.start())
        return runtime

    def _generated(self, rollout_id: int) -> RolloutFnTrainOutput:
        return _as_train_output(self._call(self._rollout_fn, rollout_id, evaluation=False))

    def _call(self, function: RolloutFn, rollout_id: int, *, evaluation: bool) -> Any:
        assert self._source is not None, "a replay has no data source"
        if self._runtime is not None:
            self._runtime.progress = Progress()
        with full_collections_wait():
            output: Any = function(self._args, rollout_id, self._source, evaluation=evaluation)
            if inspect.iscoroutine(output):
                assert self._runtime is not None, "an asynchronous rollout function needs engines"
                return self._runtime.run(output)
            return output

    def _replayed(self, rollout_id: int) -> RolloutFnTrainOutput:
        """The samples of ``--load-debug-rollout-data``; a share keeps whole groups of the file's beginning and end."""
        debug = self._config[Debug]
        groups = metrics.by_group(read_samples(Path(str(self._replay).format(rollout_id=rollout_id))))
        if debug.load_debug_rollout_data_subsample is not None:
            count = max(1, int(len(groups) * debug.load_debug_rollout_data_subsample))
            groups = groups[: count - count // 2] + groups[len(groups) - count // 2 :]
        return RolloutFnTrainOutput(groups)

    def _batch(self, rollout_id: int, samples: list[Sample]) -> RolloutBatch:
        if self._hooks.convert is not None:
            return convert.to_custom_batch(rollout_id, self._hooks.convert(self._args, samples))
        if self._hooks.reward_post_process is not None:
            raw, rewards = self._hooks.reward_post_process(self._args, samples)
        else:
            raw, rewards = convert.train_rewards(samples, self._config[Algorithm], self._config[Reward].reward_key)
        return convert.to_batch(rollout_id, samples, raw, rewards)

    def _trimmed(self, batch: RolloutBatch) -> RolloutBatch:
        flags = self._config[RolloutBuffer]
        if not flags.rollout_trim_samples or flags.use_dynamic_global_batch_size:
            return batch
        return convert.trim(batch, self._config[Data].global_batch_size)

    def _reward_metrics(self, *, evaluation: bool = False) -> dict[str, float]:
        runtime = self._runtime
        return {} if runtime is None or runtime.rewards is None else runtime.rewards.metrics(evaluation=evaluation)

    def _write(self, rollout_id: int, samples: list[Sample]) -> None:
        write_samples(self._files.rollout_samples(rollout_id), samples, self._tokenizer)
        if pattern := self._config[Debug].save_debug_rollout_data:
            write_samples(Path(pattern.format(rollout_id=rollout_id)), samples, self._tokenizer)


def _checkpoint(config: Config) -> str:
    path = config[Checkpoint].hf_checkpoint
    if path is None:
        raise ConfigError("--hf-checkpoint is not set: prompts are tokenized with its tokenizer")
    return path


def _open_eval_data(config: Config, tokenizer: ChatTokenizer) -> list[tuple[EvalDataset, PromptDataset]]:
    return [
        (
            spec,
            open_dataset(
                spec.path,
                spec.form,
                tokenizer,
                max_prompt_len=spec.max_prompt_len,
                max_prompt_flag="--eval-max-prompt-len",
            ),
        )
        for spec in eval_datasets(config)
    ]


def _settings(rollout: Rollout) -> SamplingSettings:
    return SamplingSettings(
        temperature=rollout.rollout_temperature,
        top_p=rollout.rollout_top_p,
        top_k=rollout.rollout_top_k,
        max_response_len=rollout.rollout_max_response_len,
        stop=tuple(rollout.rollout_stop or ()),
        stop_token_ids=tuple(rollout.rollout_stop_token_ids or ()),
        skip_special_tokens=rollout.rollout_skip_special_tokens,
    )


def _keeps_state_in_checkpoint(source: DataSource) -> bool:
    """Whether the state goes into the run's checkpoint; a source with a ``save`` of its own saves where it likes."""
    return isinstance(source, RolloutDataSource) and type(source).save is RolloutDataSource.save


def _as_train_output(output: RolloutFnTrainOutput | list[Any]) -> RolloutFnTrainOutput:
    """Accept plain groups, whose elements may be lists of samples."""
    if isinstance(output, RolloutFnTrainOutput):
        return RolloutFnTrainOutput([_flat(group) for group in output.samples], output.metrics)
    return RolloutFnTrainOutput([_flat(group) for group in output])


def _flat(group: Iterable[Any]) -> Group:
    return [sample for item in group for sample in ([item] if isinstance(item, Sample) else _flat(item))]


def _as_eval_output(output: RolloutFnEvalOutput | dict[str, Any]) -> RolloutFnEvalOutput:
    """Accept a plain mapping of data set names to ``rewards``, ``truncated`` and ``samples``."""
    if isinstance(output, RolloutFnEvalOutput):
        return output
    return RolloutFnEvalOutput(
        {
            name: EvalResult(list(found["rewards"]), list(found.get("truncated", ())), list(found.get("samples", ())))
            for name, found in output.items()
        }
    )


async def _close(runtime: Runtime) -> None:
    if runtime.stream is not None:
        await runtime.stream.close()
    if runtime.feed is not None:
        await runtime.feed.close()
    if runtime.rewards is not None:
        await runtime.rewards.close()
    if runtime.teacher is not None:
        await runtime.teacher.close()
    await runtime.state.client.close()

"""The teacher of on-policy distillation: engines that score what the policy wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles.core.errors import EngineError
from miles.core.protocols.engine import EngineHosts, EngineProcess
from miles.core.run_directory import RunDirectory
from miles.core.types.sample import Sample
from miles.rollout.engine_options import teacher_to_serve
from miles.rollout.engines.here import ThisMachine
from miles.rollout.flags import Distillation, Engines
from miles.rollout.http import JsonClient
from miles.rollout.servers import ENGINE_DEADLINE_S, engine_spec

if TYPE_CHECKING:
    from miles.core.config import Config


class Teacher:
    """Scores samples with the engines at ``urls``, each sample always with the same one."""

    def __init__(self, urls: Sequence[str], *, deadline_s: float) -> None:
        self._clients = [JsonClient(_with_scheme(url), deadline_s=deadline_s) for url in urls]

    async def score(self, sample: Sample) -> None:
        """Fill in ``teacher_log_probs``: of each response token, at temperature 1.  EngineError when there are none."""
        if sample.response_length == 0:
            sample.teacher_log_probs = []
            return
        # The position before the first response token has no log-probability of its own in the answer.
        start = len(sample.tokens) - sample.response_length - 1
        client = self._clients[(sample.index or 0) % len(self._clients)]
        body = {
            "input_ids": sample.tokens,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": start,
        }
        sample.teacher_log_probs = _response_log_probs(await client.post("/generate", body), sample, client.base_url)

    async def close(self) -> None:
        """Close the connections.  Safe to call twice."""
        for client in self._clients:
            await client.close()


class TeacherEngine:
    """The engine that a run starts for ``--opd-teacher-load``."""

    def __init__(self, config: Config, run_dir: Path, model: str, hosts: EngineHosts) -> None:
        engines, logs = config[Engines], RunDirectory(run_dir)
        # The index follows those of the policy's engines, and with it the accelerators.
        (place,) = hosts.places([engines.rollout_num_engines])
        spec = engine_spec(config, engines.rollout_num_engines, place, logs)
        self._process: EngineProcess = hosts.launch(
            engines.rollout_engine, replace(spec, model_path=model, log_path=logs.log_file("teacher"))
        )

    @property
    def url(self) -> str:
        return self._process.url

    def wait_ready(self) -> None:
        """Return when it answers; EngineError when it cannot."""
        self._process.wait_ready(ENGINE_DEADLINE_S)

    def check_alive(self) -> None:
        """EngineError when it has ended."""
        if not self._process.alive():
            raise EngineError(f"the teacher: {self._process.describe_end()}")

    def stop(self) -> None:
        self._process.stop()


def start_teacher_engine(config: Config, run_dir: Path, hosts: EngineHosts | None = None) -> TeacherEngine | None:
    """The teacher's engine if the run has to start one; on ``hosts``, or on this machine."""
    model = teacher_to_serve(config)
    return None if model is None else TeacherEngine(config, run_dir, model, hosts or ThisMachine(config))


def connect_teacher(config: Config, engine: TeacherEngine | None) -> Teacher | None:
    """The teacher behind ``engine`` or ``--opd-teacher-urls``; None without either."""
    urls = [engine.url] if engine is not None else config[Distillation].opd_teacher_urls
    return Teacher(urls, deadline_s=config[Engines].sglang_router_request_timeout_secs) if urls else None


def _response_log_probs(answer: Any, sample: Sample, url: str) -> list[float]:
    scored = answer.get("meta_info", {}).get("input_token_logprobs") or []
    tail = scored[-sample.response_length :]
    tokens = sample.tokens[-sample.response_length :]
    if [entry[1] for entry in tail] != tokens or any(entry[0] is None for entry in tail):
        raise EngineError(
            f"the teacher at {url} scored {len(scored)} tokens of sample {sample.index}, not the "
            f"{sample.response_length} of its response; does it answer input_token_logprobs as SGLang does?"
        )
    return [float(entry[0]) for entry in tail]


def _with_scheme(url: str) -> str:
    return url if "://" in url else f"http://{url}"

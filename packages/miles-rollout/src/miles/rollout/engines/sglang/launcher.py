"""Starts SGLang's server in its own environment: on accelerators as it is, on a CPU with what makes it run there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from miles.core.process import ChildProcess
from miles.core.protocols.engine import EngineSpec
from miles.core.weights import delta_code
from miles.rollout.engines.launched import LaunchedEngine
from miles.rollout.engines.sglang.environment import SERVER_PACKAGES, Environment
from miles.rollout.engines.sglang.options import ENVIRONMENT_OPTIONS, arguments_of, problems_with
from miles.rollout.engines.sglang.server_files import make_directory

_CPU_DEFAULTS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.3,
    "max_total_tokens": 65536,
    "max_running_requests": 256,
    "disable_overlap_schedule": True,  # with it, penalties lag one token
    "enable_deterministic_inference": True,  # the seed of a request decides what it draws
    "sleep_on_idle": True,  # an idle scheduler would otherwise keep a core busy
    "log_level": "warning",
}
_CPU_DISAGGREGATION = {
    "disaggregation_transfer_backend": "nixl",  # others move memory of accelerators only
    "disaggregation_decode_retraction_backup": "cpu_tensor",  # the other kind takes no part of the last 10 GB
}
_DRAIN_S = 2.0
"""The server would wait longer for requests that nobody will read."""
_GPU_DEFAULTS: dict[str, Any] = {"mem_fraction_static": 0.9, "log_level": "info"}


class SGLangEngine:
    """The ``sglang`` entry of ``miles.engines``."""

    def launch(self, spec: EngineSpec) -> LaunchedEngine:
        """See EngineLauncher."""
        environment = Environment.of(spec.options)
        module = "miles_sglang.serve" if spec.num_gpus else "miles_sglang.serve_cpu"
        command = [str(environment.python), "-m", module, *arguments_of(server_options(spec))]
        files = make_directory()
        variables = server_variables(spec) | {"MILES_SERVER_FILES": str(files)}
        process = ChildProcess(command, env=variables, log_path=spec.log_path, name=f"engine {spec.index}")
        return LaunchedEngine(f"http://{spec.host}:{spec.port}", process, drain_s=_DRAIN_S, files=files)

    def check(self, options: dict[str, Any]) -> list[str]:
        """See EngineLauncher."""
        environment = Environment.of(options)
        problem = environment.problem()
        if problem is not None:
            return [problem]
        given = {name: value for name, value in options.items() if name not in ENVIRONMENT_OPTIONS}
        return problems_with(given, environment.arguments()) if given else []


def server_options(spec: EngineSpec) -> dict[str, Any]:
    """Arguments of the server by name: what the spec says, over defaults, under what the user says."""
    defaults = _GPU_DEFAULTS if spec.num_gpus else _CPU_DEFAULTS
    own = {
        "model_path": spec.model_path,
        "host": spec.host,
        "port": spec.port,
        "random_seed": spec.seed,
        "tp_size": max(1, spec.num_gpus),
        "nnodes": spec.num_nodes,
        "node_rank": spec.node_rank,
        "dist_init_addr": spec.rendezvous,
        "dtype": _dtype(spec),
        "context_length": spec.context_length,
        "max_running_requests": spec.max_running_requests or defaults.get("max_running_requests"),
        "base_gpu_id": spec.first_gpu if spec.num_gpus else None,
        "skip_server_warmup": True,
        "enable_memory_saver": True if spec.releases_memory and spec.num_gpus else None,
    }
    if spec.part != "whole":
        own |= {"disaggregation_mode": spec.part, "disaggregation_bootstrap_port": spec.bootstrap_port}
        own |= {} if spec.num_gpus else _CPU_DISAGGREGATION
    user = {name: value for name, value in spec.options.items() if name not in ENVIRONMENT_OPTIONS}
    return {**defaults, **own, **user, "dtype": own["dtype"]}


def _dtype(spec: EngineSpec) -> str:
    """On a CPU ``auto`` is the checkpoint's own; SGLang would make float16 of float32."""
    if spec.dtype != "auto" or spec.num_gpus:
        return spec.dtype
    path = Path(spec.model_path) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    stored = config.get("dtype") or config.get("torch_dtype")
    return "bfloat16" if stored == "bfloat16" else "float32"


def server_variables(spec: EngineSpec) -> dict[str, str]:
    """Environment variables of the server."""
    variables = {
        "PYTHONPATH": str(SERVER_PACKAGES),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(spec.num_threads),
    }
    if spec.releases_memory or spec.part != "whole":
        # /health, which routers ask, would generate.  A server that is to give memory up dies of not being idle, and a
        # decode server that is paused with a request on its way cannot be flushed for new weights.
        variables["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "false"
    if spec.takes_changes:
        variables["MILES_CHANGE_CODE"] = delta_code.__file__
    if spec.num_gpus == 0:
        # Threads that wait by spinning would take the trainer's cores.
        variables |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_WAIT_POLICY": "passive"}
    return variables

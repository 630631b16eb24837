"""Starts the embedded engine in a process of its own."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from miles.core.process import ChildProcess
from miles.core.protocols.engine import EngineSpec
from miles.rollout.engines.launched import LaunchedEngine

_OPTIONS = {
    "max_running_requests": "--max-running-requests",
    "context_length": "--context-length",
    "dtype": "--dtype",
    "served_model_name": "--served-model-name",
    "random_seed": "--random-seed",
    "kv_cache_bytes": "--kv-cache-bytes",
    "model_layer": "--model-layer",
    "enable_return_routed_experts": "--enable-return-routed-experts",
}
"""``--sglang-*`` options that mean the same here, and two of this engine's own."""
_REQUIRED = ("torch", "safetensors", "tokenizers", "uvicorn", "orjson")


class EmbeddedEngine:
    """The ``embedded`` entry of ``miles.engines``."""

    def launch(self, spec: EngineSpec) -> LaunchedEngine:
        """See EngineLauncher."""
        values = {
            "--model-path": spec.model_path,
            "--host": spec.host,
            "--port": spec.port,
            "--num-threads": spec.num_threads,
            "--dtype": spec.dtype,
            "--random-seed": spec.seed,
            "--max-running-requests": spec.max_running_requests,
            "--context-length": spec.context_length,
        }
        values.update({_OPTIONS[name]: value for name, value in spec.options.items() if value is not None})
        args = [sys.executable, "-m", "miles.rollout.engines.embedded"]
        for flag, value in values.items():
            if isinstance(value, bool):
                args += [flag] if value else []
            elif value is not None:
                args += [flag, str(value)]
        # Threads that wait by spinning would take the trainer's cores.  numpy's products are shared among threads by
        # the engine itself (products.py).
        env = {
            "OMP_NUM_THREADS": str(spec.num_threads),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        process = ChildProcess(args, env=env, log_path=spec.log_path, name=f"engine {spec.index}")
        return LaunchedEngine(f"http://{spec.host}:{spec.port}", process)

    def check(self, options: dict[str, Any]) -> list[str]:
        """See EngineLauncher."""
        problems = [
            f"--sglang-{name.replace('_', '-')} does not apply to the embedded engine; "
            f"it takes {', '.join(sorted('--sglang-' + known.replace('_', '-') for known in _OPTIONS))}"
            for name in options
            if name not in _OPTIONS
        ]
        missing = [name for name in _REQUIRED if importlib.util.find_spec(name) is None]
        if missing:
            problems.append(
                f"the embedded engine needs {', '.join(missing)}: pip install 'miles-rollout[embedded]', "
                "or choose another --rollout-engine"
            )
        return problems

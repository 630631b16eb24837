"""``python -m miles.rollout.engines.embedded``: serve one checkpoint until told to stop."""

from __future__ import annotations

import argparse
import os
import signal
import sys

import torch
import uvicorn

from miles.core.errors import MilesError
from miles.rollout.engines.embedded.engine import Engine, EngineOptions
from miles.rollout.engines.embedded.server import Server


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m miles.rollout.engines.embedded", description=__doc__)
    parser.add_argument("--model-path", required=True, help="Hugging Face model directory with safetensors")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--num-threads", type=int, default=1, help="threads of the model")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--model-layer", default="auto", choices=["auto", "fast", "general"])
    parser.add_argument("--random-seed", type=int, default=0, help="seeds requests without a sampling_seed")
    parser.add_argument("--max-running-requests", type=int, default=256)
    parser.add_argument("--context-length", type=int, help="default: what the model was made for")
    parser.add_argument("--kv-cache-bytes", type=int, help="memory for keys and values; default: a quarter of the free")
    parser.add_argument("--enable-return-routed-experts", action="store_true", help="keep the experts of each token")
    parser.add_argument("--weight-version", default="default")
    parser.add_argument("--served-model-name")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Load, serve, and return the exit status."""
    args = parse(argv)
    torch.set_num_threads(args.num_threads)
    torch.set_num_interop_threads(1)
    options = EngineOptions(
        model_path=args.model_path,
        dtype=args.dtype,
        layer=args.model_layer,
        seed=args.random_seed,
        max_running_requests=args.max_running_requests,
        context_length=args.context_length,
        kv_bytes=args.kv_cache_bytes,
        keep_experts=args.enable_return_routed_experts,
        weight_version=args.weight_version,
        served_model_name=args.served_model_name,
    )
    try:
        engine = Engine(options, on_failure=lambda: os.kill(os.getpid(), signal.SIGTERM))
    except MilesError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    engine.runner.start()
    uvicorn.run(
        Server(engine),
        host=args.host,
        port=args.port,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=2,
    )
    engine.runner.stop()
    return 0 if engine.runner.failure is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

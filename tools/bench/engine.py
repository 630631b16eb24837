"""Generated tokens per CPU-second: the embedded engine, transformers' ways to generate, and SGLang if it is given.

    python tools/bench/engine.py --model 10m --lengths lognormal

Every contender runs in a process of its own with one checkpoint of random weights and does the same requests in turn;
all CPU time of its processes counts (for the engines HTTP included).  One JSON line with medians is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Protocol

import aiohttp
import torch
from process_tree import of_process, tree
from spread_lengths import length_of
from transformers import Qwen3Config, Qwen3ForCausalLM

from miles.core.process import ChildProcess
from miles.core.protocols.engine import EngineSpec
from miles.rollout.engines.embedded.launcher import EmbeddedEngine
from miles.rollout.engines.sglang.launcher import SGLangEngine

HERE = Path(__file__).parent
Requests = list[tuple[list[int], int]]
SIZES = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "10m": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 10,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32},
}  # fmt: skip
"""The quick start's model, and one of ten million parameters."""
START_S = 180.0
WARMUP_TOKENS = 16


class Contender(Protocol):
    """Something that generates in a process of its own."""

    pid: int

    def run(self, requests: Requests) -> int:
        """Generate all of it; return the tokens made."""

    def stop(self) -> None: ...


class Server:
    """An engine behind HTTP.  Connections are kept, as a router keeps them."""

    def __init__(self, process: ChildProcess, url: str) -> None:
        self._process, self._url = process, url
        self.pid = process.pid
        self._loop = asyncio.Runner()
        self._session = self._loop.run(self._connect())
        process.wait_ready(f"{url}/health_generate", START_S)

    def run(self, requests: Requests) -> int:
        """All requests at once, with log-probabilities."""
        return self._loop.run(self._all(requests))

    async def _all(self, requests: Requests) -> int:
        return sum(await asyncio.gather(*(self._one(*request) for request in requests)))

    async def _one(self, prompt: list[int], length: int) -> int:
        params = {"max_new_tokens": length, "temperature": 1.0, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True}
        async with self._session.post(f"{self._url}/generate", json=body) as response:
            response.raise_for_status()
            return len((await response.json())["output_ids"])

    @staticmethod
    async def _connect() -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=1800)
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)

    def stop(self) -> None:
        self._loop.run(self._session.close())
        self._loop.close()
        self._process.stop()


class Transformers:
    """``engine_transformers.py``."""

    def __init__(self, way: str, checkpoint: str, flags: argparse.Namespace) -> None:
        command = [
            sys.executable,
            str(HERE / "engine_transformers.py"),
            checkpoint,
            way,
            str(flags.threads),
            flags.dtype,
        ]
        env = {**os.environ, **threads_env(flags.threads), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=env, bufsize=1
        )
        self.pid = self._process.pid
        while self._line() != "ready":
            pass

    def run(self, requests: Requests) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(requests) + "\n")
        while not (line := self._line()).startswith("{"):
            pass
        return int(json.loads(line)["tokens"])

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"transformers ended with status {self._process.wait()}")
        return line.strip()


def main() -> None:
    flags = parse_flags()
    with tempfile.TemporaryDirectory() as directory:
        make_checkpoint(flags, directory)
        contenders: dict[str, Contender] = {}
        try:
            for name in flags.contenders:
                contenders[name] = start(name, directory, flags)
            print(json.dumps(compare(contenders, flags)))
        finally:
            for contender in contenders.values():
                contender.stop()


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="10m")
    parser.add_argument("--lengths", choices=("equal", "lognormal"), default="equal")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--group", type=int, default=1, help="requests that share a prompt")
    parser.add_argument("--new-tokens", type=int, default=128, help="of every request, with equal lengths")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="after one to warm up")
    parser.add_argument("--contenders", nargs="+", default=["miles", "static", "dynamic", "paged"])
    parser.add_argument("--sglang-python", help="interpreter of an environment with SGLang, for the contender sglang")
    return parser.parse_args()


def make_checkpoint(flags: argparse.Namespace, directory: str) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES[flags.model], tie_word_embeddings=True, max_position_embeddings=2048, eos_token_id=1)
    Qwen3ForCausalLM(config).to(getattr(torch, flags.dtype)).save_pretrained(directory)


def start(name: str, checkpoint: str, flags: argparse.Namespace) -> Contender:
    """Start a contender and return when it is ready."""
    port, log = free_port(), Path(checkpoint) / f"{name}.log"
    if name in ("miles", "sglang"):
        options = {} if name == "miles" else {"python": flags.sglang_python, "skip_tokenizer_init": True}
        spec = EngineSpec(
            checkpoint, "127.0.0.1", port, num_threads=flags.threads, dtype=flags.dtype, log_path=log, options=options
        )
        engine = (EmbeddedEngine() if name == "miles" else SGLangEngine()).launch(spec)
        return Server(engine.process, engine.url)
    return Transformers(name, checkpoint, flags)


def compare(contenders: dict[str, Contender], flags: argparse.Namespace) -> dict[str, object]:
    """Let all take turns; medians over the rounds."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    walls: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(flags.rounds + 1):
        requests = make_requests(flags, turn)
        if not turn:
            requests = [(prompt, WARMUP_TOKENS) for prompt, _ in requests]
        for name, contender in contenders.items():
            cpu, wall = cpu_seconds(contender.pid), time.perf_counter()
            tokens = contender.run(requests)
            wall, cpu = time.perf_counter() - wall, cpu_seconds(contender.pid) - cpu
            if turn:
                rates[name].append(tokens / cpu)
                walls[name].append(tokens / wall)
    medians = {name: round(statistics.median(values)) for name, values in rates.items()}
    best = max((rate for name, rate in medians.items() if name in ("static", "dynamic", "paged")), default=None)
    return {
        "benchmark": "engine",
        "model": flags.model,
        "lengths": flags.lengths,
        "requests": flags.requests,
        "group": flags.group,
        "dtype": flags.dtype,
        "threads": flags.threads,
        "tokens_per_cpu_s": medians,
        "tokens_per_s": {name: round(statistics.median(values)) for name, values in walls.items()},
        "miles_over_best_transformers": round(medians["miles"] / best, 2) if best and "miles" in medians else None,
        "miles_over_sglang": round(medians["miles"] / medians["sglang"], 2) if "sglang" in medians else None,
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def make_requests(flags: argparse.Namespace, turn: int) -> Requests:
    """Prompts of 16 to 48 tokens."""
    draw = random.Random(turn)
    vocabulary = SIZES[flags.model]["vocab_size"]
    requests: Requests = []
    for index in range(flags.requests):
        if index % flags.group == 0:
            prompt = [draw.randrange(3, vocabulary) for _ in range(draw.randint(16, 48))]
        length = flags.new_tokens if flags.lengths == "equal" else length_of(turn * flags.requests + index)
        requests.append((prompt, length))
    return requests


def cpu_seconds(pid: int) -> float:
    """Of a process and everything it started."""
    return sum(of_process(member)[0] for member in tree(pid))


def threads_env(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()

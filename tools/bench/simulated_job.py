"""The driver's loop and the real rollout role, over an engine and a trainer that only take time."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from sleeping_engine import MAX_TOKENS

from miles.core.config import Config
from miles.core.driver import job as job_module
from miles.core.driver import loop
from miles.core.driver.job import Job
from miles.core.driver.local_executor import LocalExecutor
from miles.core.driver.resume import Start
from miles.core.flags.cluster import Cluster
from miles.core.protocols.backend import TrainReport
from miles.core.run_directory import RunDirectory
from miles.core.types.batch import RolloutBatch
from miles.core.weights.sync import SyncReport

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import tiny_lm


class SleepingTrainer:
    """Takes ``seconds`` for every rollout."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.samples = self.tokens = 0

    def start(self) -> None: ...

    def train(self, batch: RolloutBatch) -> TrainReport:
        time.sleep(self._seconds)
        self.samples += len(batch)
        self.tokens += sum(batch.response_lengths)
        return TrainReport({})

    def update_weights(self, urls: list[str], version: int) -> SyncReport:
        for url in urls:
            body = json.dumps({"new_version": str(version)}).encode()
            with urllib.request.urlopen(f"{url}/update_weight_version", body, timeout=10):
                pass
        return SyncReport()

    def close(self) -> None: ...


class SimulatedExecutor(LocalExecutor):
    """The real rollout role beside a trainer that sleeps."""

    trainer: SleepingTrainer

    def actors(self, config: Config, run_dir: Path) -> Any:
        return self.trainer


def prepare(scratch: Path) -> dict[str, Any]:
    """Flags of a run on the engine at a port that is added: a tokenizer, and prompts."""
    shape = tiny_lm.Shape(hidden=16, layers=1, heads=1, kv_heads=1, mlp=16)
    tiny_lm.save_checkpoint(scratch / "model", ["What is 1 + 1?"], vocab_size=300, shape=shape, seed=0)
    prompts = scratch / "prompts.jsonl"
    rows = ({"input": f"What is {number} + {number}?", "label": str(number)} for number in range(4096))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "hf_checkpoint": str(scratch / "model"), "prompt_data": str(prompts), "label_key": "label", "rm_type": "f1",
        "rollout_max_response_len": MAX_TOKENS, "device": "cpu", "train_backend": "fsdp",
        "sglang_router_ip": "127.0.0.1", "rollout_external": True, "sglang_server_concurrency": 100_000,
    }  # fmt: skip


def run(directory: Path, port: int, train_s: float, **flags: Any) -> dict[str, Any]:
    """Train to the end; seconds of the loop alone, what was trained on, and what the engine was asked."""
    config = Config.of(rollout_external_engine_addrs=[f"127.0.0.1:{port}"], sglang_router_port=port, **flags)
    SimulatedExecutor.trainer = trainer = SleepingTrainer(train_s)
    job_module.create = lambda cluster: SimulatedExecutor(config[Cluster])
    run_dir = RunDirectory(directory).create()
    with Job(config, run_dir, Start()) as job:
        start = time.perf_counter()
        loop.run(job)
        seconds = time.perf_counter() - start
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/counts", timeout=10) as answer:
        counts = json.load(answer)
    return {"seconds": round(seconds, 3), "samples": trainer.samples, "tokens": trainer.tokens, **counts}

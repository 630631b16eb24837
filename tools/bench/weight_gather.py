"""Gathering a divided Megatron model for the engines: time against a plain copy of its bytes, and memory that it takes.

    python tools/bench/weight_gather.py

Every layout runs in ranks of their own (forked; gloo on the CPU). Rank 0 takes whole weights under their Hugging Face
names and writes them into a buffer bucket by bucket, as an update of the engines does; sending is not measured here
(``weight_sync.py``).  ``extra_mb`` is what the memory of rank 0 rises by meanwhile, above the model and the buffer:
the goal is one bucket and one layer.  Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from miles.megatron import cpu

cpu.install()

import torch  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM  # noqa: E402

from miles.core.config import Config  # noqa: E402
from miles.core.protocols.backend import Rank  # noqa: E402
from miles.core.weights.bucket import buckets  # noqa: E402
from miles.core.weights.shared_ring import LINE_BYTES, RingLayout, RingWriter  # noqa: E402
from miles.megatron.actor import MegatronActor  # noqa: E402

LAYOUTS = {
    "one rank": ("dense", 1, {}),
    "tp 2": ("dense", 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp 2": ("dense", 2, {"pipeline_model_parallel_size": 2}),
    "ep 2": ("experts", 2, {"expert_model_parallel_size": 2}),
}


def main() -> None:
    flags = parse_flags()
    if flags.only:
        print(json.dumps(measurements(flags)))
        return
    # A process that gives freed memory back at once shows what is in use, and is slower.
    exact = ("env", "MALLOC_MMAP_THRESHOLD_=65536")
    runs = {"time": (), "memory": exact}
    found = {}
    for what, prefix in runs.items():
        command = [*prefix, sys.executable, *sys.argv, "--only", what]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[what] = json.loads(done.stdout.splitlines()[-1])
    layouts = {name: found["time"][name] | found["memory"][name] for name in LAYOUTS}
    print(json.dumps({"bucket_mb": flags.bucket_mb} | layouts))


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--bucket-mb", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("time", "memory"), help=argparse.SUPPRESS)
    return parser.parse_args()


def measurements(flags: argparse.Namespace) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)  # forked children cannot use the parent's thread pool
    with tempfile.TemporaryDirectory() as folder:
        layers = {kind: make_checkpoint(flags, kind, Path(folder) / kind) for kind in ("dense", "experts")}
        found = {}
        for name, (kind, count, layout) in LAYOUTS.items():
            result = Path(folder) / "result.json"
            config = run_config(Path(folder) / kind, layout)
            on_ranks(count, lambda rank, config=config, result=result: measure(rank, config, flags, result))
            found[name] = json.loads(result.read_text()) | {"layer_mb": layers[kind]}
    return found


def make_checkpoint(flags: argparse.Namespace, kind: str, directory: Path) -> float:
    """Write a model with random weights; megabytes of its largest layer."""
    shape = {
        "vocab_size": flags.vocab,
        "hidden_size": flags.hidden,
        "intermediate_size": 3 * flags.hidden,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": flags.hidden // 8,
    }
    if kind == "experts":
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": flags.hidden}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, num_hidden_layers=flags.layers // 3))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**shape, num_hidden_layers=flags.layers))
    model.save_pretrained(directory)
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers]
    return round(max(*sizes, model.lm_head.weight.nbytes) / 2**20, 1)


def run_config(checkpoint: Path, layout: dict[str, object]) -> Config:
    return Config.of(
        train_backend="megatron",
        device="cpu",
        train_dtype="fp32",
        hf_checkpoint=str(checkpoint),
        rollout_batch_size=8,
        num_rollout=1,
        make_vocab_size_divisible_by=1,
        **layout,
    )


def measure(rank: Rank, config: Config, flags: argparse.Namespace, result: Path) -> None:
    """Gather several times; rank 0 writes what it took."""
    actor = MegatronActor(config, rank)
    limit = flags.bucket_mb << 20
    # One larger tensor is a bucket of its own.
    buffer = torch.ones(LINE_BYTES + max(limit, 2 * flags.vocab * flags.hidden * 4), dtype=torch.uint8)
    layout = RingLayout(num_readers=0, ring_bytes=len(buffer) - LINE_BYTES)
    gathers, copies, extra = [], [], []
    for _ in range(flags.rounds + 1):
        if rank.rank != 0:
            for _ in actor.named_weights():
                pass
            continue
        before = reset_peak()
        start = time.perf_counter(), time.process_time()
        size = 0
        for bucket in buckets(actor.named_weights(), limit):
            writer = RingWriter(buffer, layout, check=lambda: None)
            for slot, tensor in zip(bucket.slots, bucket.tensors, strict=True):
                writer.write(slot.offset, tensor)
            size += bucket.payload_bytes
        gathers.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        extra.append(memory("VmHWM") - before)
        copies.append(copied(buffer, size))
    if rank.rank == 0:
        wall, own = (statistics.median(column) for column in zip(*gathers[1:], strict=True))
        times = {"seconds": wall, "cpu_seconds": own, "copy_cpu_seconds": statistics.median(copies[1:])}
        # The first time also loads code and starts threads, however large the model is.
        found = {"extra_mb": max(extra[1:]) / 2**20} if flags.only == "memory" else {"mb": size / 2**20} | times
        result.write_text(json.dumps({name: round(value, 3) for name, value in found.items()}))
    actor.close()


def copied(buffer: torch.Tensor, size: int) -> float:
    """CPU-seconds of copying ``size`` bytes within memory, a bufferful at a time."""
    source, start = torch.ones_like(buffer), time.process_time()
    while size > 0:
        part = min(size, len(buffer))
        buffer[:part].copy_(source[:part])
        size -= part
    return time.process_time() - start


def reset_peak() -> int:
    """Forget the peak of this process's memory; what it has now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(name: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(found) * 1024


def on_ranks(count: int, function: Callable[[Rank], None]) -> None:
    """Call ``function`` in ``count`` forked processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        master = f"127.0.0.1:{probe.getsockname()[1]}"
    children = []
    for number in range(count):
        if child := os.fork():
            children.append(child)
            continue
        try:
            function(Rank(rank=number, world_size=count, local_rank=number, master=master))
        finally:
            os._exit(0)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()

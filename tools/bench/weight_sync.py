"""Moving weights to an engine: bytes per second of each transport against a plain copy, and what changes weigh.

An embedded engine in a process of its own takes the weights of a Qwen3-shaped model; the copy of the same tensors
within one process is measured in turns with it.  ``_gb_s`` counts a whole update, from pause to continue, ``send`` the
moving and its proof alone, ``_median`` the middle one of the rounds' shares.  ``_cpu_of_memcpy`` is the CPU time of a
plain copy over that of the slower side in a whole update: what a machine reaches on which both sides have a core,
whoever else uses this one.  The changes are those of AdamW steps on bf16 weights kept in fp32.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from miles.core.ports import free_ports
from miles.core.protocols.engine import EngineSpec
from miles.core.weights.delta import ChangeTracker
from miles.core.weights.engine_client import EngineFleet
from miles.core.weights.sync import push_weights
from miles.core.weights.transport import TRANSPORTS
from miles.rollout.engines.embedded.launcher import EmbeddedEngine

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from tiny_lm import Shape, save_checkpoint

BUCKET_BYTES = 512 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint(Path(folder) / "model", args.hidden, args.layers)
        result = {"mbytes": round(sum(tensor.nbytes for _, tensor in model) / 2**20, 1)}
        result |= rates(model, Path(folder), args.rounds)
    result["delta_share"] = {f"{lr:g}": delta_share(model, lr) for lr in (args.lr, 10 * args.lr)}
    sys.stdout.write(json.dumps(result) + "\n")


def make_checkpoint(path: Path, hidden: int, layers: int) -> list[tuple[str, torch.Tensor]]:
    """Write a model in bf16; its weights by name."""
    shape = Shape(hidden=hidden, layers=layers, heads=8, kv_heads=2, mlp=3 * hidden)
    save_checkpoint(path, ["Calculate 814 + 707."] * 20, vocab_size=300, shape=shape, seed=0)
    torch.manual_seed(0)
    lm = Qwen3ForCausalLM(Qwen3Config.from_pretrained(path)).bfloat16()
    lm.save_pretrained(path)
    return [(name, tensor.detach()) for name, tensor in lm.named_parameters()]


def rates(model: list[tuple[str, torch.Tensor]], folder: Path, rounds: int) -> dict[str, float]:
    """GB/s of whole updates by each transport, and of the copy: the best round of each, all taking turns."""
    (port,) = free_ports(1)
    spec = EngineSpec(
        str(folder / "model"), "127.0.0.1", port, num_threads=1, dtype="bfloat16", log_path=folder / "engine.log"
    )
    engine = EmbeddedEngine().launch(spec)
    transports = {name: TRANSPORTS.get(name)(folder) for name in ("shm", "broadcast", "disk")}
    fleet = EngineFleet([engine.url])
    size = sum(tensor.nbytes for _, tensor in model)
    copies = [torch.empty_like(tensor) for _, tensor in model]
    seconds: dict[str, list[float]] = {name: [] for each in ("memcpy", *transports) for name in (each, f"{each}_send")}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in ("memcpy", *transports)}
    try:
        engine.wait_ready(300)
        for version in range(rounds + 1):
            with timed(seconds["memcpy"]), timed(cpu_seconds["memcpy"], time.process_time):
                for copy, (_, tensor) in zip(copies, model, strict=True):
                    copy.copy_(tensor)
            for name, transport in transports.items():
                here, there = time.process_time(), cpu_time(engine.process.pid)
                with timed(seconds[name]):
                    report = push_weights(model, fleet, transport, version=version, bucket_bytes=BUCKET_BYTES)
                cpu_seconds[name].append(max(time.process_time() - here, cpu_time(engine.process.pid) - there))
                seconds[f"{name}_send"].append(report.timings["send"])
    finally:
        for transport in transports.values():
            transport.close()
        fleet.close()
        engine.stop()
    found = {f"{name}_gb_s": size / min(times[1:]) / 1e9 for name, times in seconds.items() if times}
    copying = min(cpu_seconds["memcpy"][1:])
    found |= {f"{name}_cpu_of_memcpy": copying / min(cpu_seconds[name][1:]) for name in transports}
    found["shm_send_of_memcpy"] = found["shm_send_gb_s"] / found["memcpy_gb_s"]
    rounds_of_both = zip(seconds["memcpy"][1:], seconds["shm_send"][1:], strict=True)
    found["shm_send_of_memcpy_median"] = statistics.median(copy / send for copy, send in rounds_of_both)
    return {name: round(value, 3) for name, value in found.items()}


@contextmanager
def timed(seconds: list[float], clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
    start = clock()
    yield
    seconds.append(clock() - start)


def cpu_time(pid: int) -> float:
    """CPU seconds of a process's threads that live."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def delta_share(model: list[tuple[str, torch.Tensor]], lr: float, steps: int = 3) -> float:
    """Bytes of the changes of one AdamW step over the bytes of the model, after a few steps of warm-up."""
    masters = [(name, tensor.float().requires_grad_()) for name, tensor in model]
    optimizer = torch.optim.AdamW([master for _, master in masters], lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    tracker, sent = ChangeTracker(), 0
    list(tracker.whole(model))
    for _ in range(steps):
        for _, master in masters:
            master.grad = torch.randn(master.shape, generator=generator)
        optimizer.step()
        tracker.finish("0")
        sent = sum(tensor.nbytes for _, tensor in tracker.changes([(n, m.detach().bfloat16()) for n, m in masters]))
    return round(sent / sum(tensor.nbytes for _, tensor in model), 5)


if __name__ == "__main__":
    main()

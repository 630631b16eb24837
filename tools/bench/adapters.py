"""An adapter (LoRA) that the engine adds, against whole weights with it added: what an update and what decoding costs.

A trainer's model with adapters on all linear layers of its decoder, and an embedded engine for each way in a process of
its own, all on one thread.  Both ways take turns; the best of each counts.  An update's CPU-seconds are those of
gathering, sending and taking, on both sides.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, Qwen3ForCausalLM
from weight_sync import cpu_time, make_checkpoint

from miles.core.ports import free_ports
from miles.core.protocols.engine import EngineSpec
from miles.core.weights.adapter_form import AdapterForm
from miles.core.weights.adapters import LoraSpec
from miles.core.weights.engine_client import EngineFleet
from miles.core.weights.shm import SharedMemoryTransport
from miles.core.weights.sync import push_weights
from miles.core.weights.transport import WeightTransport
from miles.fsdp.export import adapter_form, named_adapters, named_weights
from miles.fsdp.lora import add_adapters
from miles.rollout.engines.embedded.launcher import EmbeddedEngine

BUCKET_BYTES = 512 << 20
Costs = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        make_checkpoint(path, args.hidden, args.layers)
        spec = LoraSpec(args.rank, 2.0 * args.rank, ("all-linear",), (), None, seed=0)
        sys.stdout.write(json.dumps(measure(trained_model(path, spec), spec, path, args)) + "\n")


def trained_model(path: Path, spec: LoraSpec) -> PreTrainedModel:
    """With adapters that change what it computes."""
    lm = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32)
    add_adapters(lm, spec)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return lm


def measure(lm: PreTrainedModel, spec: LoraSpec, path: Path, args: argparse.Namespace) -> dict[str, float]:
    dtype = getattr(torch, args.dtype)
    costs: Costs = {}
    sizes: dict[str, int] = {}
    with ExitStack() as stack:
        engines = {way: stack.enter_context(running(path, args.dtype, way)) for way in ("adapter", "merged")}
        for version in range(args.rounds + 1):
            for way, (fleet, transport, pid) in engines.items():
                form = adapter_form(lm, spec) if way == "adapter" else None
                tensors = named_weights(lm, dtype) if form is None else named_adapters(lm, dtype)
                sizes[way] = update(tensors, fleet, transport, version, form, pid, costs, way)
                generate(fleet, args, pid, costs, way)
    best = {name: min(values[1:]) for name, values in costs.items()}
    found = {f"{way}_mb": size / 1e6 for way, size in sizes.items()} | best
    for way in sizes:
        found[f"{way}_tokens_per_cpu_s"] = args.requests * args.tokens / found.pop(f"{way}_decode_cpu_s")
    return {name: round(value, 4) for name, value in found.items()}


@contextmanager
def running(path: Path, dtype: str, way: str) -> Iterator[tuple[EngineFleet, WeightTransport, int]]:
    """An engine, how weights reach it, and its process."""
    (port,) = free_ports(1)
    spec = EngineSpec(str(path), "127.0.0.1", port, dtype=dtype, log_path=path / f"{way}.log")
    engine = EmbeddedEngine().launch(spec)
    transport, fleet = SharedMemoryTransport(path), EngineFleet([engine.url])
    try:
        engine.wait_ready(300)
        yield fleet, transport, engine.process.pid
    finally:
        transport.close()
        fleet.close()
        engine.stop()


def update(
    tensors: Iterator[tuple[str, torch.Tensor]],
    fleet: EngineFleet,
    transport: WeightTransport,
    version: int,
    form: AdapterForm | None,
    pid: int,
    costs: Costs,
    way: str,
) -> int:
    """Bytes; the costs are kept under the name of the ``way``."""
    before, start = time.process_time() + cpu_time(pid), time.perf_counter()
    report = push_weights(tensors, fleet, transport, version=version, bucket_bytes=BUCKET_BYTES, adapter=form)
    costs.setdefault(f"{way}_update_s", []).append(time.perf_counter() - start)
    costs.setdefault(f"{way}_update_cpu_s", []).append(time.process_time() + cpu_time(pid) - before)
    return report.bytes


def generate(fleet: EngineFleet, args: argparse.Namespace, pid: int, costs: Costs, way: str) -> None:
    prompts = [[5 + (7 * number + i) % 90 for i in range(16)] for number in range(args.requests)]
    params = {"max_new_tokens": args.tokens, "ignore_eos": True, "sampling_seed": 1}
    # Weights that came are laid out at the first pass, which is not decoding.
    fleet.post("/generate", {"input_ids": prompts[:1], "sampling_params": params | {"max_new_tokens": 1}})
    before = cpu_time(pid)
    fleet.post("/generate", {"input_ids": prompts, "sampling_params": params})
    costs.setdefault(f"{way}_decode_cpu_s", []).append(cpu_time(pid) - before)


if __name__ == "__main__":
    main()

"""Log-probabilities under a large vocabulary, forward and backward: time, and memory beside inputs and gradients.

    python tools/bench/logprobs.py [--trl-python PATH] [--tokens 1024] [--hidden 896] [--vocabulary 151936]
                                   [--forward-only] [--idle 0.5]

Contenders: Miles' ``linear_logprobs``; log-softmax of all logits; TRL's chunked function and Liger's fused one where
the Python that is named has them.  Each run is a process of its own, in turns; medians are printed as one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

LogProbs = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SAMPLING_S = 0.005


def miles() -> LogProbs:
    from miles.core.math.logprobs import linear_logprobs

    return lambda hidden, weight, target: linear_logprobs(hidden, weight, target).logp_T


def plain() -> LogProbs:
    def logprobs(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = hidden @ weight.T
        return logits.float().log_softmax(-1).gather(1, target[:, None])[:, 0]

    return logprobs


def trl() -> LogProbs:
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    return lambda hidden, weight, target: _ChunkedLogProbFunction.apply(
        hidden, weight, None, target, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
    )[0]


def liger() -> LogProbs:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda hidden, weight, target: -loss(weight, hidden, target)


CONTENDERS: dict[str, Callable[[], LogProbs]] = {"miles": miles, "plain": plain, "trl": trl, "liger": liger}


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


class Peak:
    """Memory of this process while a block runs: on an accelerator what it allocated, else resident pages."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done = threading.Event()
        self.mb = 0.0

    def __enter__(self) -> Peak:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / 2**20
        else:
            self._before = resident_mb()
            self._sampler = threading.Thread(target=self._sample)
            self._sampler.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            self.mb = torch.cuda.max_memory_allocated() / 2**20 - self._before
            return
        self._done.set()
        self._sampler.join()

    def _sample(self) -> None:
        while not self._done.wait(SAMPLING_S):
            self.mb = max(self.mb, resident_mb() - self._before)


def measure(flags: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(flags.threads)
    device, dtype = torch.device(flags.device), getattr(torch, flags.dtype)
    draw = torch.Generator(device).manual_seed(0)
    logprobs = CONTENDERS[flags.only]()
    hidden = torch.randn(flags.tokens, flags.hidden, generator=draw, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(flags.vocabulary, flags.hidden, generator=draw, device=device, dtype=dtype)
    weight = (weight * flags.hidden**-0.5).requires_grad_()
    target = torch.randint(flags.vocabulary, (flags.tokens,), generator=draw, device=device)
    logprobs(hidden[:8].detach(), weight.detach(), target[:8])
    gradients_mb = (hidden.numel() + weight.numel()) * hidden.element_size() / 2**20
    factor = torch.linspace(-1, 1, flags.tokens, device=device)
    factor[torch.arange(flags.tokens, device=device) % 100 < 100 * flags.idle] = 0.0
    with Peak(device) as peak, torch.set_grad_enabled(not flags.forward_only):
        cpu, wall = time.process_time(), time.perf_counter()
        logp = logprobs(hidden, weight, target)
        if not flags.forward_only:
            (logp * factor).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "cpu_s": round(cpu, 3),
        "wall_s": round(wall, 3),
        "extra_mb": round(peak.mb - (0.0 if flags.forward_only else gradients_mb), 1),
        "mean_logp": round(logp.mean().item(), 5),
        "gradient_norm": 0.0 if weight.grad is None else round(weight.grad.norm().item(), 4),
    }


def run_alone(name: str, python: str) -> dict[str, float] | str:
    done = subprocess.run([python, *sys.argv, "--only", name], capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--forward-only", action="store_true", help="no backward pass, as for old log-probabilities")
    parser.add_argument("--idle", type=float, default=0.0, help="share of tokens without a gradient")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trl-python", help="a Python with TRL, and perhaps Liger")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.only:
        print(json.dumps(measure(flags)))
        return
    pythons = {"miles": sys.executable, "plain": sys.executable}
    if flags.trl_python:
        pythons |= {"trl": flags.trl_python, "liger": flags.trl_python}
    runs: dict[str, list[dict[str, float] | str]] = {name: [] for name in pythons}
    for _ in range(flags.repeats):
        for name, python in pythons.items():
            runs[name].append(run_alone(name, python))
    settings = {name: value for name, value in vars(flags).items() if name not in ("only", "trl_python")}
    medians = {name: _medians(of) for name, of in runs.items()}
    print(
        json.dumps({"bench": "logprobs", "machine": platform.processor() or platform.machine(), **settings, **medians})
    )


def _medians(runs: list[dict[str, float] | str]) -> dict[str, float] | str:
    """Of every number; or why there is none."""
    found = [run for run in runs if isinstance(run, dict)]
    if not found:
        return str(runs[0])
    return {key: statistics.median(run[key] for run in found) for key in found[0]}


if __name__ == "__main__":
    main()

"""What the router costs: against no router, the Rust sglang-router and a FastAPI proxy, in one interleaved run.

    python tools/bench/router.py --rounds 3 --seconds 2 --systems direct miles sglang naive --cases small large prompt

Prints one JSON line per case: medians over the rounds of requests per second, latency and, the steadiest figure, CPU
microseconds per request in the router (its whole process tree), and its peak memory.  ``asgi`` is this router's slow
path as with middleware that looks at requests only, ``middleware`` the same with one that changes every answer.
``sglang`` needs the ``sglang-router`` wheel in this environment or the one of ``--sglang-python``; ``naive`` needs
httpx.  With two or more CPUs the routers run on the last one, worker and client on the others.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from router_load import Case, allow_many_connections

WORKERS = 2
LOAD = str(Path(__file__).with_name("router_load.py"))
PEAK = re.compile(r"VmHWM:\s*(\d+) kB")
START_TIMEOUT_S = 60.0
SYSTEMS = ("direct", "miles", "asgi", "middleware", "sglang", "naive")


CASES = {
    "small": Case(64, 200, 2_000),
    "small512": Case(512, 200, 2_000),
    "large": Case(64, 200, 1_000_000),
    "large512": Case(512, 200, 1_000_000),
    "upload": Case(64, 1_000_000, 2_000),
    "prompt": Case(64, 100_000, 2_000),
    "delayed": Case(64, 200, 2_000, delay_ms=50),
    "flight8000": Case(8_000, 200, 2_000, delay_ms=4_000),
    "slow_readers": Case(8, 200, 64_000_000, pause_s=2.0),
}


def commands(ports: dict[str, int], workers: list[str], sglang_python: str) -> dict[str, list[str]]:
    """How each router is started."""
    miles = f"-m miles.router --port {ports['miles']} --log-level warning --worker".split()
    asgi = f"-m miles.router --hot-path off --port {ports['asgi']} --log-level warning --worker".split()
    stamp = f"-m miles.router --middleware router_load:Stamp --port {ports['middleware']} --log-level warning --worker"
    sglang = f"-m sglang_router.launch_router --port {ports['sglang']} --policy round_robin --log-level error".split()
    return {
        "miles": [sys.executable, *miles, *workers],
        "asgi": [sys.executable, *asgi, *workers],
        "middleware": [sys.executable, *stamp.split(), *workers],
        "sglang": [sglang_python, *sglang, "--worker-urls", *workers],
        "naive": [sys.executable, LOAD, "naive", str(ports["naive"]), *workers],
    }


def process_tree(pid: int) -> list[int]:
    found = [pid]
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                found += process_tree(int(child))
    return found


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and its children, in nanosecond steps."""
    total = 0
    for process in process_tree(pid):
        for stat in Path(f"/proc/{process}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                total += int(stat.read_text().split()[0])
    return total / 1e9


def forget_peak(pid: int) -> None:
    """Begin to measure the peak memory of a process and its children anew."""
    for process in process_tree(pid):
        Path(f"/proc/{process}/clear_refs").write_text("5")


def peak_mb(pid: int) -> float:
    """Most memory since ``forget_peak``, summed over the processes."""
    status = (Path(f"/proc/{process}/status").read_text() for process in process_tree(pid))
    return sum(int(PEAK.search(text)[1]) for text in status) * 1024 / 1e6


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_serving(port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    body = b'{"rid": "10-0", "input_ids": [1]}'
    request = urllib.request.Request(f"http://127.0.0.1:{port}/generate", body, {"content-type": "application/json"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


@contextlib.contextmanager
def started(command: list[str], cpus: set[int]) -> Iterator[subprocess.Popen[bytes]]:
    here = Path(__file__).parent  # where a router finds its middleware
    process = subprocess.Popen(command, cwd=here, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.sched_setaffinity(process.pid, cpus)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measure(port: int, pid: int | None, case: Case, seconds: float, cpus: set[int]) -> dict[str, float]:
    if pid:
        forget_peak(pid)
    before = cpu_s(pid) if pid else 0.0
    load = [sys.executable, LOAD, "clients", str(port), json.dumps(vars(case)), str(seconds)]
    output = subprocess.run(
        load, check=True, capture_output=True, preexec_fn=lambda: os.sched_setaffinity(0, cpus)
    ).stdout
    seen = json.loads(output)
    time.sleep(0.2)
    cpu = (cpu_s(pid) if pid else 0.0) - before
    return seen | {"cpu_us": cpu / max(1, seen["requests"]) * 1e6, "peak_mb": peak_mb(pid) if pid else 0.0}


def bench(options: argparse.Namespace) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    router_cpus, load_cpus = ({cpus[-1]}, set(cpus[:-1])) if len(cpus) > 1 else (set(cpus), set(cpus))
    worker_ports = [free_port() for _ in range(WORKERS)]
    urls = [f"http://127.0.0.1:{port}" for port in worker_ports]
    ports = {name: free_port() for name in SYSTEMS[1:]} | {"direct": worker_ports[0]}
    how = commands(ports, urls, options.sglang_python)
    with contextlib.ExitStack() as stack:
        stack.enter_context(started([sys.executable, LOAD, "workers", *map(str, worker_ports)], load_cpus))
        wait_until_serving(worker_ports[0])
        pids: dict[str, int | None] = {"direct": None}
        for name in options.systems:
            if name != "direct":
                pids[name] = stack.enter_context(started(how[name], router_cpus)).pid
        for name in options.systems:
            wait_until_serving(ports[name])
        results: dict[str, dict[str, list[dict[str, float]]]] = {
            case: {name: [] for name in options.systems} for case in options.cases
        }
        for number in range(options.rounds + 1):
            for case in options.cases:
                for name in options.systems[:: 1 if number % 2 else -1]:
                    seconds = options.seconds if number else 0.5  # the first round warms up
                    seen = measure(ports[name], pids[name], CASES[case], seconds, load_cpus)
                    if number:
                        results[case][name].append(seen)
    for case, systems in results.items():
        print(json.dumps(report(case, systems)), flush=True)


def report(case: str, systems: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    medians = {
        name: {
            key: round(statistics.median(round_[key] for round_ in rounds), 2)
            for key in ("rps", "p50_ms", "p99_ms", "cpu_us", "peak_mb")
        }
        | {"errors": sum(round_["errors"] for round_ in rounds)}
        for name, rounds in systems.items()
    }
    line: dict[str, Any] = {"bench": "router", "case": case, **vars(CASES[case]), "systems": medians}
    if "miles" in medians:
        own = medians["miles"]
        line["cpu_ratio_to_miles"] = {
            name: round(values["cpu_us"] / own["cpu_us"], 2)
            for name, values in medians.items()
            if values["cpu_us"] and name != "miles"
        }
        if "direct" in medians:
            line["miles_added_p50_ms"] = round(own["p50_ms"] - medians["direct"]["p50_ms"], 2)
    return line


def main() -> None:
    allow_many_connections()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_sglang = importlib.util.find_spec("sglang_router") is not None
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["small", "large", "prompt"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--sglang-python", default=sys.executable, help="Python that has sglang-router")
    options = parser.parse_args()
    sglang = ["sglang"] if has_sglang or options.sglang_python != sys.executable else []
    options.systems = options.systems or ["direct", "miles", *sglang, "naive"]
    bench(options)


if __name__ == "__main__":
    main()

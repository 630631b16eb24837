"""What a command and everything it starts cost: CPU-seconds, memory, and both at the moments that matter."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

POLL_S = 0.05
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(frozen=True, slots=True)
class Mark:
    """The state of the tree when a line appeared in the watched file."""

    wall_s: float
    cpu_s: float


@dataclass(slots=True)
class Usage:
    """What the whole tree used, from start to end."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_rss_mib: float = 0.0
    """Highest sum of resident memory seen; memory shared between processes counts in each of them."""
    marks: list[Mark] = field(default_factory=list)
    """One per line of the watched file, in order."""
    status: int = 0


def run(
    command: Sequence[str],
    *,
    watch: Path | None = None,
    counts: Callable[[bytes], bool] = bool,
    log: Path,
    env: dict[str, str] | None = None,
) -> Usage:
    """Run ``command`` to its end; take a mark whenever a line that ``counts`` appears in the file ``watch``."""
    usage = Usage()
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})
    lines = _Lines(watch, counts)
    seen: dict[int, float] = {}
    while process.poll() is None:
        memory = 0.0
        for pid in tree(process.pid):
            cpu, rss = of_process(pid)
            seen[pid] = max(cpu, seen.get(pid, 0.0))
            memory += rss
        usage.cpu_s = sum(seen.values())
        usage.wall_s = time.monotonic() - start
        usage.peak_rss_mib = max(usage.peak_rss_mib, memory)
        usage.marks += [Mark(usage.wall_s, usage.cpu_s)] * lines.new()
        time.sleep(POLL_S)
    usage.status = process.returncode
    if usage.status != 0:
        raise RuntimeError(f"{command[0]} ended with status {usage.status}; see {log}:\n{log.read_text()[-2000:]}")
    return usage


def tree(root: int) -> Iterator[int]:
    """``root`` and everything that descends from it."""
    yield root
    for task in Path(f"/proc/{root}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # the thread or process has just ended
            continue
        for child in children:
            yield from tree(int(child))


def of_process(pid: int) -> tuple[float, float]:
    """CPU-seconds and resident MiB of one process, without its children; zeros once it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, 0.0
    user, system, pages = int(stat[11]), int(stat[12]), int(stat[21])
    return (user + system) / TICKS_PER_S, pages * PAGE_MIB


class _Lines:
    """Counts lines as they are appended to a file."""

    def __init__(self, path: Path | None, counts: Callable[[bytes], bool]) -> None:
        self._path, self._counts, self._offset, self._rest = path, counts, 0, b""

    def new(self) -> int:
        """Lines that have come since the last call and count."""
        if self._path is None or not self._path.is_file() or self._path.stat().st_size == self._offset:
            return 0
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            data = stream.read()
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return sum(map(self._counts, lines))


def is_rollout(line: bytes) -> bool:
    """Whether a line of ``metrics.jsonl`` ends a rollout."""
    return bool(json.loads(line)["kind"] == "rollout")

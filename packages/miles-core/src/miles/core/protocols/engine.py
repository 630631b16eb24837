"""Engines: HTTP servers that speak SGLang's protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol


@dataclass(frozen=True, slots=True)
class EnginePlace:
    """Where an engine is to run."""

    host: str
    """Address of its machine at which it listens."""
    port: int
    """Nobody listens there."""
    bootstrap_port: int = 0
    """Where decode servers find it if it is a prefill server."""
    first_gpu: int = 0
    """Its first accelerator, counted among those that the process may use."""
    num_threads: int = 1
    num_nodes: int = 1
    """Machines of one engine."""
    rendezvous: str | None = None
    """``host:port`` at which the machines of one engine find each other; None where it has one."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Everything needed to start one engine."""

    model_path: str
    host: str
    port: int
    index: int = 0
    seed: int = 0
    num_gpus: int = 0
    """Accelerators of this engine (tensor parallel size); 0 runs on the CPU."""
    first_gpu: int = 0
    """The first of them, counted among those that the process may use."""
    num_threads: int = 1
    num_nodes: int = 1
    """Machines that the engine is spread over; its accelerators are divided among them."""
    node_rank: int = 0
    """Which of them this process is for; the first one serves."""
    rendezvous: str | None = None
    """``host:port`` at which they find each other."""
    part: Literal["whole", "prefill", "decode"] = "whole"
    """What it computes of a response: its prompt's keys and values, or everything after them, or both."""
    bootstrap_port: int = 0
    """Where decode servers find it if it is a prefill server."""
    dtype: str = "auto"
    max_running_requests: int | None = None
    context_length: int | None = None
    log_path: Path | None = None
    releases_memory: bool = False
    """It will be told to release its memory, and to take it again."""
    takes_changes: bool = False
    """Its weights will come as changes of those before (``--update-weight-delta``)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Values of the ``--sglang-*`` flags that were given, without the prefix."""


class EngineProcess(Protocol):
    """A started engine.  Owned by who started it, who also stops it."""

    @property
    def url(self) -> str:
        """``http://host:port``."""

    def wait_ready(self, deadline_s: float) -> None:
        """Return when ``/health_generate`` answers 200; EngineError with the end of its log when it dies or is late."""

    def alive(self) -> bool:
        """Whether the process runs."""

    def describe_end(self) -> str:
        """For people: which engine has ended, with which exit status, and the last lines of its log."""

    def stop(self, deadline_s: float = 10.0) -> None:
        """Terminate, then kill; return when the process is gone."""


class EngineLauncher(Protocol):
    """``miles.engines`` entry points name a class without arguments of this shape."""

    def launch(self, spec: EngineSpec) -> EngineProcess:
        """Start the server and return at once."""

    def check(self, options: dict[str, Any]) -> list[str]:
        """Problems with ``--sglang-*`` options, found before the run."""


class EngineHosts(Protocol):
    """The machines that the engines of a run live on.

    An engine is known by its index; one that takes a lost one's place has the same.
    """

    def places(self, indices: Sequence[int]) -> list[EnginePlace]:
        """Where those engines are to run, which are about to be launched.

        EngineError when there is no machine for one of them.
        """

    def launch(self, engine: str, spec: EngineSpec) -> EngineProcess:
        """Start the ``engine`` (its name in ``miles.engines``) in its place and return at once."""

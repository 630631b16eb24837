"""The ``miles`` command in forks of a process that has imported what runs import, which takes longer than they do.

``python warm_runs.py`` reads commands, one JSON line each, and writes the exit status of each.
"""

from __future__ import annotations

import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

# What a run of the FSDP trainer with a Qwen3 model imports.
_IMPORTS = (
    "miles.core.driver.run",
    "miles.core.driver.local_executor",
    "miles.fsdp.actor",
    "miles.rollout.manager",
    "transformers.models.qwen3.modeling_qwen3",
)


class WarmRuns:
    """Owner of the process.  Started by the first command."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[str] | None = None
        self._count = 0

    def run(
        self, arguments: tuple[str, ...], variables: dict[str, str], deadline_s: float
    ) -> subprocess.CompletedProcess[str]:
        """Status and output of ``miles ARGUMENTS`` with these environment variables beside its own.

        Raises subprocess.TimeoutExpired after ``deadline_s``.
        """
        self._count += 1
        out, err = (self._directory / f"{self._count}.{name}" for name in ("out", "err"))
        streams = {"out": str(out), "err": str(err)}
        command = {"arguments": arguments, "variables": variables, "directory": str(Path.cwd()), **streams}
        status = self._ask(json.dumps(command), deadline_s)
        said, complained = (path.read_text(errors="replace") for path in (out, err))
        return subprocess.CompletedProcess(("miles", *arguments), status, said, complained)

    def stop(self) -> None:
        """End the process and what it has forked."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None

    def _ask(self, line: str, deadline_s: float) -> int:
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                if not selector.select(deadline_s):
                    raise subprocess.TimeoutExpired(line, deadline_s)
            return int(process.stdout.readline())
        except BaseException:  # the test's own deadline, too: an answer after it would be taken for the next run's
            self.stop()
            raise

    def _start(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        return self._process


def _become(command: dict[str, Any]) -> None:
    """In a fork: have the command's streams, environment and working directory."""
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, command["out"], os.O_WRONLY | os.O_CREAT),
        (2, command["err"], os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(path, flags), number)
    os.environ.update(command["variables"])
    sys.path[:0] = filter(None, command["variables"].get("PYTHONPATH", "").split(os.pathsep))
    os.chdir(command["directory"])


def _serve() -> None:
    from miles.core import environ

    environ.prepare_process()
    from miles.core.cli import main

    for name in _IMPORTS:
        importlib.import_module(name)
    while line := sys.stdin.readline():
        command = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(command)
            sys.argv = ["miles", *command["arguments"]]
            sys.exit(main(command["arguments"]))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()

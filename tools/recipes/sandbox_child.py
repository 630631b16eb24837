"""The process that ``python_sandbox`` starts: sets its limits, then runs the program that comes on standard input.

The program is the first process of a PID namespace without network: when it ends, or is ended, every process that it
started ends with it.  That takes user namespaces; where there are none, nothing is run.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import sys
from types import FrameType
from typing import Any

_NEW_USER, _NEW_PID, _NEW_NET = 0x10000000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38


def main() -> None:
    limits = json.loads(sys.argv[1])
    code = sys.stdin.buffer.read().decode(errors="replace")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.unshare(_NEW_USER | _NEW_PID | _NEW_NET) != 0:
        print("[the sandbox needs user namespaces, which this system does not give]", flush=True)
        sys.exit(1)
    _become_parent_of_program()
    _limit(limits)
    exec(compile(code, "program", "exec"), {"__name__": "__main__"})  # noqa: S102  that is what it is for


def _become_parent_of_program() -> None:
    """Return in the child; the parent waits, passes its end on, and ends it when it is told to end."""
    child = os.fork()
    if child == 0:
        return

    def end(number: int, frame: FrameType | None) -> None:
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    os.close(1)
    os.close(2)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _limit(limits: dict[str, Any]) -> None:
    cpu = math.ceil(limits["cpu_seconds"])
    # The first process of a PID namespace ignores signals it does not handle; SIGKILL comes at the hard limit.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits["open_files"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXCPU, lambda number, frame: os._exit(128 + signal.SIGXCPU))


main()

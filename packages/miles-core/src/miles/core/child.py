"""First program of a child process: bind its life to its owner's, set its environment, become the real program.

Run as ``python -I -S child.py OWNER_PID [NAME=VALUE ...] -- PROGRAM [ARGUMENT ...]``.  Doing this here and not between
``fork`` and ``exec`` keeps Python code out of a forked copy of a process with threads.  Standard library only.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def become(owner_pid: int, settings: list[str], args: list[str]) -> None:
    """Replace this process by ``args``; the kernel kills it when the owner ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != owner_pid:  # it ended before the call above
        raise SystemExit(1)
    for setting in settings:
        os.putenv(*setting.split("=", 1))
    try:
        os.execvp(args[0], args)
    except OSError as error:
        raise SystemExit(f"cannot run {args[0]}: {error.strerror}") from error


if __name__ == "__main__":
    separator = sys.argv.index("--")
    become(int(sys.argv[1]), sys.argv[2:separator], sys.argv[separator + 1 :])

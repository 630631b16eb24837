"""A tool that runs Python code of the model's, with real limits; for ``--custom-generate-function-path multi_turn``.

    --generate-tool-specs-path python_sandbox.SPECS --generate-execute-tool-function-path python_sandbox.execute

Each call is a process of its own: no environment, an empty directory that is removed afterwards, limits on processor
time, memory, files and output, no network, and an end by SIGKILL.  ``sandbox_child.py`` shows what the kernel is asked
for.  It keeps honest code from doing harm; for code that attacks on purpose use a virtual machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SPECS = [
    {
        "type": "function",
        "function": {
            "name": "python",
            "description": "Run a Python program and return what it prints.",
            "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
        },
    }
]
_CHILD = Path(__file__).with_name("sandbox_child.py")
_END_DEADLINE_S = 2.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use."""

    seconds: float = 5.0
    """By the clock."""
    cpu_seconds: int = 3
    memory_bytes: int = 512 << 20
    """Of address space, per process."""
    file_bytes: int = 8 << 20
    """Of one file."""
    open_files: int = 32
    output_bytes: int = 16 << 10


async def execute(name: str, params: dict[str, Any]) -> str:
    """``--generate-execute-tool-function-path``"""
    return await run(str(params["code"]))


async def run(code: str, limits: Limits = Limits()) -> str:
    """What ``code`` prints, errors included, and how it ended if not well."""
    with tempfile.TemporaryDirectory(prefix="sandbox-") as directory:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", str(_CHILD), json.dumps(asdict(limits)),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            cwd=directory, env={"PATH": "/usr/bin:/bin"}, start_new_session=True,
        )  # fmt: skip
        try:
            async with asyncio.timeout(limits.seconds):
                output, whole = await _converse(process, code.encode(), limits.output_bytes)
                ending = await _ending(process) if whole else f"[stopped after {limits.output_bytes} bytes of output]"
        except TimeoutError:
            output, ending = b"", f"[killed after {limits.seconds:g} seconds]"
        finally:
            await _end(process)
    text = output.decode(errors="replace")
    return f"{text}{ending}" if ending or text else "[no output]"


async def _converse(process: asyncio.subprocess.Process, code: bytes, most: int) -> tuple[bytes, bool]:
    """Hand the program over; its output, and whether that is all of it."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(code)
        await process.stdin.drain()
        process.stdin.close()
    output = b""
    while len(output) <= most and (piece := await process.stdout.read(most + 1 - len(output))):
        output += piece
    return output[:most], len(output) <= most


async def _ending(process: asyncio.subprocess.Process) -> str:
    """How the program ended, if that is worth telling."""
    status = await process.wait()
    number = -status if status < 0 else status - 128
    if number in set(signal.Signals):
        name = signal.Signals(number).name
        return {"SIGXCPU": "[out of processor time]", "SIGXFSZ": "[wrote too large a file]"}.get(name, f"[{name}]")
    return ""


async def _end(process: asyncio.subprocess.Process) -> None:
    """Let the child end its program, then kill whatever is left of the process group."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.communicate(), _END_DEADLINE_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.communicate()  # also reads what is left in the pipe, without which it never counts as ended

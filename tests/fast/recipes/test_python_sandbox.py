"""Programs that behave badly: each is held, and nothing is left behind."""

import asyncio
import os
import time
from pathlib import Path

import pytest
from python_sandbox import SPECS, Limits, execute, run

pytestmark = pytest.mark.skipif(
    "user namespaces" in asyncio.run(run("pass")), reason="this system gives no user namespaces"
)
QUICK = Limits(seconds=30.0, cpu_seconds=1)


def processes():
    """Ids of this process' descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found, grown = {os.getpid()}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return found - {os.getpid()}


async def test_what_a_program_prints_is_the_answer():
    assert await execute("python", {"code": "import math\nprint(math.comb(5, 2))"}) == "10\n"
    assert SPECS[0]["function"]["name"] == "python"


async def test_an_error_is_told():
    assert "ZeroDivisionError" in await run("1 / 0")
    assert await run("pass") == "[no output]"


async def test_a_program_that_waits_is_killed_and_leaves_nothing():
    before = processes()
    start = time.perf_counter()
    assert await run("import time; time.sleep(60)", Limits(seconds=0.7)) == "[killed after 0.7 seconds]"
    assert time.perf_counter() - start < 30
    assert processes() == before


async def test_processor_time_is_limited():
    assert "[out of processor time]" in await run("while True: pass", QUICK)


async def test_memory_is_limited():
    assert "MemoryError" in await run("x = bytearray(2 << 30)", QUICK)


async def test_files_are_limited_and_gone_afterwards():
    told = await run("import os; print(os.getcwd()); open('big', 'wb').write(bytes(9 << 20))", QUICK)
    assert "File too large" in told or "[wrote too large a file]" in told
    assert not os.path.exists(told.splitlines()[0])  # noqa: ASYNC240


async def test_output_is_limited():
    told = await run("while True: print('x' * 1000)", QUICK)
    assert told.endswith("[stopped after 16384 bytes of output]")
    assert len(told) < 20_000


async def test_there_is_no_network():
    code = "import socket\ns = socket.socket()\ns.settimeout(2)\ns.connect(('127.0.0.1', PORT))\nprint('connected')"
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    told = await run(code.replace("PORT", str(port)), QUICK)
    server.close()
    assert "connected" not in told


async def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert "hunter2" not in await run("import os; print(dict(os.environ))", QUICK)


async def test_processes_of_a_program_end_with_it():
    before = processes()
    escape = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\nprint('done')"
    await run(escape, Limits(seconds=1.5))
    assert processes() == before


@pytest.mark.timeout(60)
async def test_many_at_once():
    told = await asyncio.gather(*(run(f"print({n} ** 2)", Limits(seconds=30)) for n in range(8)))
    assert told == [f"{n * n}\n" for n in range(8)]

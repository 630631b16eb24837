"""A router in a process of its own."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path


class Process:
    """``python -m miles.router`` with a free port."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port

    async def get(self, target: str) -> tuple[int, bytes]:
        """Status and body; ConnectionResetError when the answer broke off, as any HTTP client has it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        head, ends, body = answer.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head.lower())
        if not ends or (length and len(body) < int(length[1])):
            raise ConnectionResetError
        return int(head.split(b" ", 2)[1]), body

    async def answers(self, target: str, text: str) -> None:
        """Return when ``text`` is in the answer to ``GET target``."""
        async with asyncio.timeout(20):
            while text.encode() not in (await self.get(target))[1]:  # noqa: ASYNC110  another process
                await asyncio.sleep(0.02)

    async def ready(self, workers: int) -> None:
        await self.answers("/health", f'"ready_workers":{workers}')

    async def ended(self) -> int:
        return await asyncio.wait_for(self.process.wait(), 20)

    @property
    def peak_mb(self) -> float:
        """Most memory that the process has had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024

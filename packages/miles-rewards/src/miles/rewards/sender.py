"""A process that sends requests to a reward service: see ``miles.rewards.senders``."""

from __future__ import annotations

import asyncio
import json
import sys

from miles.rewards.client import Client
from miles.rewards.senders import MAX_LINE_BYTES, outcome_fields
from miles.rewards.verdict import failed


async def serve(arguments: str) -> None:
    """Answer the lines of standard input until it ends."""
    client = Client(**json.loads(arguments))
    reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks: set[asyncio.Task[None]] = set()
    while line := await reader.readline():
        task = asyncio.create_task(_answer(client, line))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    for task in tasks:  # nobody is left to read what they bring
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.close()


async def _answer(client: Client, line: bytes) -> None:
    number, _, body = line.partition(b" ")
    try:
        answer = await client.ask(body.rstrip(b"\n"))
    except Exception as error:  # whoever asked is in another process, and waits
        answer = failed("error", f"{type(error).__name__}: {error}"[:300], 0.0)
    outcome = json.dumps(outcome_fields(answer)).encode()
    sys.stdout.buffer.write(b"%b %b\n" % (number, outcome))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))

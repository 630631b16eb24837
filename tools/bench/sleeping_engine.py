"""An engine that generates by sleeping: SGLang's protocol, any number of requests, no processor time to speak of.

    python tools/bench/sleeping_engine.py --tokens-per-s 100 --mean-tokens 50 [--spread 0.5] [--gather 0]

A request's response has as many tokens as its sampling seed says, and takes ``1 / tokens_per_s`` for each.  An abort is
answered with the tokens that are there, and a request that goes on with a response generates the rest only.
``--gather N``: nothing is answered before N prompts are in flight.  ``GET /counts`` says what was generated.
Prints its port.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

MAX_TOKENS = 100_000
"""``max_new_tokens`` of a fresh request: what is left of it says how much of the response exists already."""
TOKEN = 65


@dataclass(slots=True)
class Counts:
    """What was asked of the engine."""

    generated_tokens: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    aborted: int = 0


class SleepingEngine:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.counts = Counts()
        self.version = "0"
        self._aborted = asyncio.Event()
        self._gathered = asyncio.Event()

    async def generate(self, request: web.Request) -> web.Response:
        payload = await request.json()
        if not isinstance(payload["input_ids"][0], list):
            return web.json_response(await self._respond(payload["sampling_params"]))
        return web.json_response(await asyncio.gather(*map(self._respond, payload["sampling_params"])))

    async def _respond(self, params: dict[str, Any]) -> dict[str, Any]:
        counts = self.counts
        counts.in_flight += 1
        counts.most_in_flight = max(counts.most_in_flight, counts.in_flight)
        if counts.in_flight >= self._options.gather:
            self._gathered.set()
        await self._gathered.wait()
        wanted = max(1, self.length(params["sampling_seed"]) - (MAX_TOKENS - params["max_new_tokens"]))
        tokens, finish = await self._generated(wanted)
        counts.in_flight -= 1
        counts.generated_tokens += tokens
        return {
            "text": "a" * tokens,
            "meta_info": {
                "finish_reason": {"type": finish},
                "output_token_logprobs": [[-1.0, TOKEN, None]] * tokens,
                "weight_version": self.version,
            },
        }

    async def _generated(self, wanted: int) -> tuple[int, str]:
        """Tokens generated until the response ends, or an abort ends it."""
        speed, start = self._options.tokens_per_s, asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(wanted / speed):
                await self._aborted.wait()
        except TimeoutError:
            return wanted, "stop"
        self.counts.aborted += 1
        return min(wanted, int((asyncio.get_running_loop().time() - start) * speed)), "abort"

    def length(self, seed: int) -> int:
        """Tokens of a response: log-normal around the mean."""
        spread = self._options.spread
        return max(1, round(self._options.mean_tokens * random.Random(seed).lognormvariate(-(spread**2) / 2, spread)))

    async def abort(self, request: web.Request) -> web.Response:
        self._aborted.set()
        self._aborted = asyncio.Event()
        return web.json_response({"success": True})

    async def set_version(self, request: web.Request) -> web.Response:
        self.version = (await request.json())["new_version"]
        return web.json_response({"success": True})

    async def ok(self, request: web.Request) -> web.Response:
        return web.json_response({"success": True})

    async def report(self, request: web.Request) -> web.Response:
        return web.json_response({name: getattr(self.counts, name) for name in Counts.__slots__})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens-per-s", type=float, default=100.0)
    parser.add_argument("--mean-tokens", type=int, default=50)
    parser.add_argument("--spread", type=float, default=0.0)
    parser.add_argument("--gather", type=int, default=0)
    return parser.parse_args()


async def serve(options: argparse.Namespace) -> None:
    engine = SleepingEngine(options)
    app = web.Application(client_max_size=64 * 1024**2)
    app.router.add_post("/generate", engine.generate)
    app.router.add_post("/abort_request", engine.abort)
    app.router.add_post("/update_weight_version", engine.set_version)
    app.router.add_get("/counts", engine.report)
    app.router.add_route("*", "/{anything:.*}", engine.ok)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=16384).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


@contextmanager
def sleeping_engine(**options: float):
    """Run one in a process of its own; its port."""
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    with subprocess.Popen([sys.executable, str(Path(__file__)), *flags], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


if __name__ == "__main__":
    asyncio.run(serve(parse_options()))

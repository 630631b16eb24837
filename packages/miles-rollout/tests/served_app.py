"""A web application on a free port, for as long as a ``with`` block lasts."""

from __future__ import annotations

from typing import Self

from aiohttp import web

from miles.rollout.loop_thread import LoopThread


class ServedApp:
    """Subclasses add their routes to ``app``."""

    def __init__(self) -> None:
        self.app = web.Application()
        self.url = ""
        self._loop = LoopThread("served-app")

    def __enter__(self) -> Self:
        self._loop.run(self._start())
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.run(self._runner.cleanup())
        self._loop.stop()

    async def _start(self) -> None:
        self._runner = web.AppRunner(self.app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, shutdown_timeout=0.1).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

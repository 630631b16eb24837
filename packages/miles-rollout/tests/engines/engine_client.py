"""Talks to an engine over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

GREEDY = {"max_new_tokens": 8, "temperature": 0.0, "ignore_eos": True}
PROMPT = [5, 6, 7, 8]


class Client:
    """One client's requests."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session, self.url = session, url

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(self.url + path) as response:
            return response.status, await self._body(response)

    async def post(self, path: str, body: Any = None) -> tuple[int, Any]:
        async with self.session.post(self.url + path, json=body or {}) as response:
            return response.status, await self._body(response)

    async def ok(self, path: str, body: Any = None) -> Any:
        status, answer = await self.post(path, body)
        assert status == 200, answer
        return answer

    async def generate(self, **body: Any) -> Any:
        return await self.ok("/generate", {"input_ids": PROMPT, "sampling_params": GREEDY, **body})

    def start(self, **body: Any) -> asyncio.Task[Any]:
        return asyncio.create_task(self.generate(**body))

    async def events(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Of a streamed answer, without the ``[DONE]`` that ends it."""
        async with self.session.post(self.url + path, json={**body, "stream": True}) as response:
            assert response.status == 200
            assert response.content_type == "text/event-stream"
            last = ""
            async for raw in response.content:
                line = raw.decode().strip()
                if line:
                    last = line.removeprefix("data: ")
                    if last != "[DONE]":
                        yield json.loads(last)
            assert last == "[DONE]"

    @staticmethod
    async def _body(response: aiohttp.ClientResponse) -> Any:
        return await (response.json() if response.content_type == "application/json" else response.text())

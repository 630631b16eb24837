"""The router as its middleware sees it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from miles.router.dispatcher import Dispatcher
from miles.router.extras import load_tokenizer
from miles.router.fetch import FetchedResponse
from miles.router.framing import Header
from miles.router.inner import ask
from miles.router.workers import Worker

if TYPE_CHECKING:
    from miles.router.tokenizer import CheckpointTokenizer


class Handle:
    """See ``miles.router.middleware.RouterHandle``."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.settings = dispatcher.settings
        self._dispatcher = dispatcher

    @cached_property
    def tokenizer(self) -> CheckpointTokenizer:
        return load_tokenizer(self.settings, "a middleware")

    @property
    def workers(self) -> Sequence[Worker]:
        return list(self._dispatcher.fleet)

    @property
    def weight_version(self) -> str | None:
        return self._dispatcher.fleet.weight_version

    async def ask(self, method: str, target: str, headers: Sequence[Header], body: bytes) -> FetchedResponse:
        return await ask(self._dispatcher, method, target, headers, body)

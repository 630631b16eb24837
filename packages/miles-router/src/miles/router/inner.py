"""Requests that the router makes of the fleet on behalf of a client, with queue, policy, retries and counting."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from miles.router.dispatcher import Dispatcher
from miles.router.exchange import Exchange
from miles.router.fetch import Assembly, FetchedResponse
from miles.router.framing import Header, ResponseHead
from miles.router.refusal import Refusal


class RefusedError(Exception):
    """The router has no answer of a worker: none is free, all failed, or time is over."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


async def ask(
    dispatcher: Dispatcher, method: str, target: str, headers: Sequence[Header], body: bytes
) -> FetchedResponse:
    """A worker's whole answer; raises RefusedError.  Cancelling aborts the request at its worker."""
    exchange = InnerExchange(dispatcher, method.encode("ascii"), target.encode("ascii"), list(headers), len(body))
    exchange.feed(body)
    exchange.feed_end()
    try:
        return await exchange.response
    finally:
        exchange.client_gone()


class InnerExchange(Exchange):
    """A request whose client is the router itself; the answer is put together in memory."""

    __slots__ = ("_assembly", "response")

    def __init__(
        self, dispatcher: Dispatcher, method: bytes, target: bytes, headers: list[Header], declared_length: int
    ) -> None:
        super().__init__(dispatcher, method, target, headers, declared_length)
        self.response: asyncio.Future[FetchedResponse] = dispatcher.loop.create_future()
        self._assembly = Assembly()

    def deliver_head(self, head: ResponseHead, data: bytes, body_at: int, complete: bool) -> None:
        self._assembly.head = head
        self.deliver(data[body_at:], complete)

    def deliver(self, data: bytes, complete: bool) -> None:
        whole = self._assembly.add(data, complete)
        if whole is not None and not self.response.done():
            self.response.set_result(whole)

    def deliver_refusal(self, refusal: Refusal) -> None:
        if not self.response.done():
            self.response.set_exception(RefusedError(refusal))

    def deliver_cut(self) -> None:
        self.deliver_refusal(Refusal(502, "the worker's answer broke off"))

    def pause_client(self) -> None:
        """The body is in memory already."""

    def resume_client(self) -> None:
        """See ``pause_client``."""

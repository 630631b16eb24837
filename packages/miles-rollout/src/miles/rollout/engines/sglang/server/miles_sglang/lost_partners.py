# mypy: disable-error-code="import-not-found"
"""A decode server keeps nothing for prefill servers that are gone.

SGLang keeps the memory of a transfer that failed until the prefill server says that it writes no more, and for half a
minute when it says nothing, as one that was killed.  Meanwhile the decode server is not idle: it cannot be flushed, and
the next update of weights would fail.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

Address = tuple[str, int]

_SILENCE_S = 0.5
"""Of a prefill server, before it is asked whether it is there; from one question to the next."""
_CONNECT_S = 0.2


def install() -> None:
    """Teach SGLang's decode scheduler; for others it changes nothing."""
    from sglang.srt.disaggregation.decode import DecodeTransferQueue

    DecodeTransferQueue.resolve_deferred_releases = freeing(DecodeTransferQueue.resolve_deferred_releases)


def freeing(resolve: Callable[[Any], None]) -> Callable[[Any], None]:
    """``resolve(queue)``, which waits for no word of processes that have ended."""
    lookout = Lookout()

    def awaited(kept: Any) -> Any:
        """The same; nobody has to give his word when all who could write are gone."""
        request, since, deadline, slot, required = kept
        if not required or time.monotonic() - since < _SILENCE_S:
            return kept
        writers = {(info["rank_ip"], int(info["rank_port"])) for info in request.kv_receiver.bootstrap_infos}
        return (request, since, deadline, slot, 0) if all(map(lookout.is_gone, writers)) else kept

    @wraps(resolve)
    def resolve_deferred_releases(queue: Any) -> None:
        queue._deferred_releases = [awaited(kept) for kept in queue._deferred_releases]
        resolve(queue)

    return resolve_deferred_releases


class Lookout:
    """Knows which processes have ended, and asks each of them now and then only."""

    def __init__(self) -> None:
        self._seen: dict[Address, tuple[float, bool]] = {}

    def is_gone(self, address: Address) -> bool:
        """Whether nobody listens at ``address`` any more.  What cannot be reached may still be there."""
        at, gone = self._seen.get(address, (-math.inf, False))
        if time.monotonic() - at >= _SILENCE_S:
            gone = _refuses(address)
            self._seen[address] = time.monotonic(), gone
        return gone


def _refuses(address: Address) -> bool:
    try:
        socket.create_connection(address, timeout=_CONNECT_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False

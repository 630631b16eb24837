"""What a worker is sent of a request: its head written anew, and the name by which it can be aborted."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from miles.router.framing import CONNECTION_FIELDS, Header, connection_options

_WRITTEN_ANEW = frozenset((b"content-length", b"transfer-encoding", b"host", b"expect", b"trailer"))
_DROPPED = CONNECTION_FIELDS | _WRITTEN_ANEW
_REQUEST_ID = re.compile(rb'"rid"\s*:\s*("(?:[^"\\]|\\.){1,512}"|\[[^\[\]]{1,4096}\])')


def request_head(method: bytes, target: bytes, authority: bytes, headers: list[Header], framing: bytes) -> bytes:
    """The head of a request to the worker called ``authority``; ``framing`` is the line that says where its body ends.

    Fields of the client's connection are left out.
    """
    lines = [method + b" " + target + b" HTTP/1.1\r\nhost: " + authority]
    for name, value in headers:
        if name not in _DROPPED:
            lines.append(name + b": " + value)
        elif name == b"connection" and value.lower() not in (b"keep-alive", b"close"):
            lines[1:] = _lines_without(connection_options(headers) | _WRITTEN_ANEW, headers)
            break
    lines.append(framing)
    return b"\r\n".join(lines) + b"\r\n"


def _lines_without(dropped: frozenset[bytes], headers: Sequence[Header]) -> list[bytes]:
    return [b"%b: %b" % field for field in headers if field[0] not in dropped]


def request_ids(body: bytes) -> str | list[str] | None:
    """The engine's name for a request, its ``rid``; a list for a batch; None when the client gave none."""
    match = _REQUEST_ID.search(body)
    try:
        value = json.loads(match[1]) if match else None
    except ValueError:
        return None
    return value if isinstance(value, str | list) else None

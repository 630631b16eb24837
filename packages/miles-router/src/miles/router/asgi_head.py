"""Heads of requests as ASGI scopes have them."""

from __future__ import annotations

import re
import urllib.parse
from typing import Any

import httptools
from starlette.types import Scope

from miles.router.framing import Header, read_fields
from miles.router.heads import HeadMemo
from miles.router.plain import PLAIN_REQUEST, PlainHead


class RequestLine:
    """Method and target as a scope has them.  Raises ValueError for a target without a path."""

    __slots__ = ("part",)

    def __init__(self, method: bytes, target: bytes, version: str) -> None:
        try:
            url = httptools.parse_url(target)
        except httptools.HttpParserInvalidURLError as error:
            raise ValueError(str(error)) from None
        if url.path is None:
            raise ValueError("no path")
        self.part: dict[str, Any] = {
            "http_version": version,
            "method": method.decode("ascii"),
            "path": urllib.parse.unquote(url.path.decode("ascii")),
            "raw_path": url.path,
            "query_string": url.query or b"",
        }


class PlainAsgiHead(PlainHead):
    """A plain head, and what a scope has of it: the same for all requests but for the length."""

    __slots__ = ("earlier", "later", "line")

    def __init__(self, match: re.Match[bytes]) -> None:
        super().__init__(match)
        head, length_at = match.group(), match.start(4)
        self.line = RequestLine(match[1], match[2], "1.1")
        self.earlier = read_fields(head[head.index(b"\r\n") + 2 : head.rindex(b"\r\n", 0, length_at) + 2])
        self.later = read_fields(match[5])

    def headers(self, length: int) -> list[Header]:
        """Fields in the order in which they came."""
        return [*self.earlier, (b"content-length", b"%d" % length), *self.later]

    def is_that_of(self, scope: Scope, headers: list[Header]) -> bool:
        """Whether ``scope`` says what this head with these ``headers`` says: an application may have changed it."""
        part = self.line.part
        return bool(
            scope["headers"] == headers
            and scope["raw_path"] is part["raw_path"]
            and scope["query_string"] is part["query_string"]
            and scope["method"] is part["method"]
        )


read_plain_asgi_head = HeadMemo(PLAIN_REQUEST, 4, PlainAsgiHead).read
"""Meaning, length and end of the plain head that bytes begin with; None for others."""

"""Answers that the router gives itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http import HTTPStatus


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error in place of a worker's answer."""

    status: int
    message: str
    retry_after_s: int | None = None

    def body(self) -> bytes:
        """JSON in the form OpenAI clients expect of an error."""
        return json.dumps({"error": {"message": self.message, "type": "router_error", "code": self.status}}).encode()


def refusal_bytes(refusal: Refusal, keep_alive: bool, bodiless: bool = False) -> bytes:
    """``refusal`` as a response on the wire."""
    body = refusal.body()
    lines = [
        f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
    ]
    if refusal.retry_after_s is not None:
        lines.append(f"retry-after: {refusal.retry_after_s}")
    if not keep_alive:
        lines.append("connection: close")
    return "\r\n".join([*lines, "\r\n"]).encode("ascii") + (b"" if bodiless else body)

"""Which request targets concern the router itself."""

from __future__ import annotations

from miles.router.fanout import FAN_OUT_PATHS

OPEN_PATHS = frozenset(("/health", "/liveness", "/readiness"))
"""Answered without a token."""

WORKER_PATHS = frozenset(("/add_worker", "/remove_worker", "/list_workers", "/workers", "/metrics", "/router/status"))

_MAX_KNOWN_TARGETS = 1024
_CONTROL_TARGETS = frozenset(path.encode() for path in OPEN_PATHS | WORKER_PATHS | FAN_OUT_PATHS)

_known_targets: dict[bytes, bool] = {}  # needs_asgi of targets seen lately


def needs_asgi(target: bytes) -> bool:
    """Whether a request target is the control plane's, or written so that only a full parse can tell."""
    known = _known_targets.get(target)
    if known is None:
        if len(_known_targets) >= _MAX_KNOWN_TARGETS:
            _known_targets.clear()
        known = _known_targets[target] = _is_unusual(target)
    return known


def _is_unusual(target: bytes) -> bool:
    query = target.find(b"?")
    path = target if query < 0 else target[:query]
    return (
        path in _CONTROL_TARGETS
        or not path.startswith(b"/")
        or b"%" in path
        or b"#" in path
        or path.startswith((b"/workers/", b"/sessions"))
    )

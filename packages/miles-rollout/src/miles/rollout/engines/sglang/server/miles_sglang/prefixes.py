# mypy: disable-error-code="import-not-found"
"""The prefix cache by weight version: what old weights have computed is not found by who starts with new ones.

Needed where an update flushes nothing (``in_place``).  A request takes the version that is served when it looks for its
prefix, and keeps it while it holds keys and values, so that they are filed under the weights that began them.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from sglang.srt.mem_cache import common
from sglang.srt.runtime_context import get_serving

MARK = "miles_versioned_prefixes"
"""In /server_info among the weight loaders: this is how a trainer knows."""
_SEPARATOR = "\x1fweights "


def install() -> None:
    """Let every look-up name the version."""
    common._req_radix_key = _by_version(common._req_radix_key)


def _by_version(radix_key: Any) -> Any:
    @wraps(radix_key)
    def of_request(tree_cache: Any, request: Any, *args: Any, **named: Any) -> Any:
        if not request.kv.holds_kv:
            given, _, _ = (request.extra_key or "").partition(_SEPARATOR)
            request.extra_key = f"{given}{_SEPARATOR}{get_serving().weight_version}"
        return radix_key(tree_cache, request, *args, **named)

    return of_request

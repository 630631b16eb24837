"""Requests with a common prefix go to the worker that has it in its cache."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence

from miles.router.policies import RoutableRequest, W
from miles.router.policies.load import least_loaded
from miles.router.settings import Settings

_BLOCK_BYTES = 256
_MAX_BLOCKS = 256  # of one prompt: 64 KiB of JSON, about 10,000 token ids
_MAX_ENTRIES = 1 << 18
_PROMPT = re.compile(rb'"(?:input_ids|text|prompt|messages)"\s*:\s*')


class CacheAware:
    """The worker that has seen the longest prefix of the prompt, unless it is too busy.

    The prompt is compared as it is written in the body, in blocks, without parsing it.  Only the hash of a block and
    all before it is remembered, together with the worker that got it last.  A worker with ``balance_threshold`` more
    requests in flight than the least loaded one is passed over.
    """

    def __init__(self, settings: Settings) -> None:
        self._threshold = settings.balance_threshold
        self._seen: OrderedDict[int, str] = OrderedDict()
        self._turn = 0

    def choose(self, workers: Sequence[W], request: RoutableRequest) -> W:
        """See Policy."""
        self._turn = (self._turn + 1) % len(workers)
        keys = prefix_keys(request.body_start())
        idlest = least_loaded(workers, self._turn)
        chosen = self._longest_match(workers, keys)
        if chosen is None or chosen.in_flight > idlest.in_flight + self._threshold:
            chosen = idlest
        self._remember(keys, chosen.url)
        return chosen

    def _longest_match(self, workers: Sequence[W], keys: list[int]) -> W | None:
        by_url = {worker.url: worker for worker in workers}
        for key in reversed(keys):
            url = self._seen.get(key)
            if url in by_url:
                return by_url[url]
        return None

    def _remember(self, keys: list[int], url: str) -> None:
        for key in keys:
            self._seen[key] = url
            self._seen.move_to_end(key)
        while len(self._seen) > _MAX_ENTRIES:
            self._seen.popitem(last=False)


def prefix_keys(body: bytes) -> list[int]:
    """One key for each full block of the prompt in ``body``: equal keys, equal prompts up to the end of that block."""
    match = _PROMPT.search(body)
    if match is None:
        return []
    start = match.end()
    keys, key = [], 0
    for end in range(start + _BLOCK_BYTES, min(len(body), start + _MAX_BLOCKS * _BLOCK_BYTES) + 1, _BLOCK_BYTES):
        key = hash((key, body[end - _BLOCK_BYTES : end]))
        keys.append(key)
    return keys

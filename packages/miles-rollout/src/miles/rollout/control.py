"""Short control requests to engines and router, from threads that have no event loop."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping, Sequence
from urllib.parse import urlencode, urlsplit

from miles.core.errors import EngineError

DEADLINE_S = 10.0
MEMORY_DEADLINE_S = 120.0
"""Tens of gigabytes are given up or taken."""
FLUSH_DEADLINE_S = 30.0
_POLL_S = 0.05


class RefusedError(EngineError):
    """It answered, and not with 200."""


def register(router_url: str, engine_url: str) -> None:
    """Let the router send requests to the engine; EngineError when it does not take it."""
    try:
        _ask(router_url, "POST", f"/add_worker?{urlencode({'url': engine_url})}")
    except EngineError as error:
        raise EngineError(f"the router at {router_url} did not take engine {engine_url}: {error}") from error


def unregister(router_url: str, engine_url: str) -> None:
    """Let the router forget the engine at once, and send what the engine has not answered to others."""
    _ask(router_url, "POST", f"/remove_worker?{urlencode({'url': engine_url, 'timeout_s': 0})}")


def introduce(engine_url: str, prefill_servers: Sequence[Mapping[str, object]]) -> None:
    """Tell a decode server which prefill servers there are now: ``url``, and ``host`` and ``port`` to be found at."""
    _ask(engine_url, "POST", "/prefill_servers", payload={"servers": list(prefill_servers)})


def held_version(engine_url: str) -> str | None:
    """Version of the weights that the engine says it holds; None when it keeps none.  EngineError without an answer."""
    version = json.loads(_ask(engine_url, "GET", "/model_info")).get("weight_version")
    return None if version is None else str(version)


def release_memory(engine_url: str, tags: Sequence[str]) -> int:
    """Have the engine give the memory of ``tags`` up; the bytes, 0 when it does not tell."""
    _flush(engine_url)
    answer = _ask(engine_url, "POST", "/release_memory_occupation", MEMORY_DEADLINE_S, {"tags": list(tags)})
    try:
        return int(json.loads(answer)["released_bytes"])
    except (ValueError, KeyError, TypeError):  # SGLang answers with nothing
        return 0


def resume_memory(engine_url: str, tags: Sequence[str]) -> None:
    """Have the engine take the memory of ``tags`` again."""
    _ask(engine_url, "POST", "/resume_memory_occupation", MEMORY_DEADLINE_S, {"tags": list(tags)})


def load_own_weights(engine_url: str) -> None:
    """Have the engine load the checkpoint that it was started with."""
    found = json.loads(_ask(engine_url, "GET", "/server_info")).get("model_path")
    _ask(engine_url, "POST", "/update_weights_from_disk", MEMORY_DEADLINE_S, {"model_path": found})


def _flush(engine_url: str) -> None:
    """Empty the cache.  An engine that has just answered its last request may need a moment until it is idle."""
    deadline = time.monotonic() + FLUSH_DEADLINE_S
    while True:
        try:
            _ask(engine_url, "POST", "/flush_cache", MEMORY_DEADLINE_S)
        except RefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)
        else:
            return


def heartbeat(engine_url: str, timeout_s: float) -> str | None:
    """What is wrong with the engine; None when ``/health_generate`` answers 200 in time."""
    try:
        _ask(engine_url, "GET", "/health_generate", timeout_s)
    except EngineError as error:
        return str(error)
    return None


def _ask(url: str, method: str, path: str, timeout_s: float = DEADLINE_S, payload: object = None) -> bytes:
    """Body of the answer; EngineError on anything but 200."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout_s)
    try:
        if payload is None:
            connection.request(method, path)
        else:
            connection.request(method, path, json.dumps(payload), {"Content-Type": "application/json"})
        response = connection.getresponse()
        body = response.read()
    except TimeoutError:
        raise EngineError(f"{url}{path} did not answer within {timeout_s:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise EngineError(f"{url}{path} gave no answer ({type(error).__name__}: {error})") from error
    finally:
        connection.close()
    if response.status != 200:
        raise RefusedError(f"{url}{path} answered {response.status}: {body[:300].decode(errors='replace')}")
    return body

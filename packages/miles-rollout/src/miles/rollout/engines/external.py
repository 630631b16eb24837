"""Engines that somebody else started (``--rollout-external``)."""

from __future__ import annotations

import http.client
import time
from urllib.parse import urlsplit

from miles.core.errors import EngineError

_POLL_S = 1.0
_PROBE_DEADLINE_S = 5.0


class ExternalEngine:
    """An engine at a given address.  It is used and never stopped; see EngineProcess."""

    def __init__(self, address: str) -> None:
        self.url = (address if "://" in address else f"http://{address}").rstrip("/")

    def wait_ready(self, deadline_s: float) -> None:
        """Return when ``/health_generate`` answers 200."""
        deadline = time.monotonic() + deadline_s
        problem = self._problem()
        while problem is not None:
            if time.monotonic() + _POLL_S > deadline:
                raise EngineError(f"--rollout-external-engine-addrs {self.url} is not ready: {problem}")
            time.sleep(_POLL_S)
            problem = self._problem()

    def alive(self) -> bool:
        """Always: its owner watches it, and a request that fails says so."""
        return True

    def describe_end(self) -> str:
        """Its exit status and its log are with its owner."""
        return f"the external engine at {self.url} does not answer; whoever started it has its log"

    def stop(self, deadline_s: float = 10.0) -> None:
        """Nothing: it belongs to somebody else."""

    def _problem(self) -> str | None:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=_PROBE_DEADLINE_S)
        try:
            connection.request("GET", "/health_generate")
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            connection.close()
        return None if status == 200 else f"/health_generate answered {status}"

"""How requests reach the engines: through the router, and in ``--prefill-num-servers`` through decode servers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from miles.core.errors import EngineError
from miles.core.flags.cluster import Cluster
from miles.core.protocols.engine import EngineSpec
from miles.rollout import control
from miles.rollout.flags import Engines

if TYPE_CHECKING:
    from miles.core.config import Config

logger = logging.getLogger(__name__)


def part_of(config: Config, index: int) -> Literal["whole", "prefill", "decode"]:
    """What engine ``index`` computes: the first ones of the policy's are the prefill servers."""
    count = config[Cluster].prefill_num_servers
    if count is None or index >= config[Engines].rollout_num_engines:
        return "whole"
    return "prefill" if index < count else "decode"


def num_answering(config: Config) -> int:
    """Engines that the router sends requests to."""
    return config[Engines].rollout_num_engines - (config[Cluster].prefill_num_servers or 0)


class Front:
    """Which engines serve.

    The router knows all but prefill servers.  Those are known to the decode servers, each of which sends on to one of
    them what it gets.  Called by several threads.
    """

    def __init__(self, router_url: Callable[[], str]) -> None:
        self._router_url = router_url
        self._specs: dict[str, EngineSpec] = {}
        self._prefill: set[str] = set()
        """Addresses of those that serve."""
        self._decode: set[str] = set()
        self._changing = threading.Lock()

    def know(self, url: str, spec: EngineSpec) -> None:
        """An engine was launched."""
        self._specs[url] = spec

    def open(self, url: str) -> None:
        """An engine serves from now on.  EngineError when that cannot be told."""
        with self._changing:
            part = self._part(url)
            if part == "prefill":
                self._prefill.add(url)
                self._tell_decode_servers()
                return
            if part == "decode":
                control.introduce(url, self._prefill_servers())
                self._decode.add(url)
        control.register(self._router_url(), url)

    def close(self, url: str) -> None:
        """An engine is lost: nothing more is sent to it, and what it had goes to others."""
        with self._changing:
            self._decode.discard(url)
            if self._part(url) == "prefill":
                self._prefill.discard(url)
                self._tell_decode_servers()
                return
        try:
            control.unregister(self._router_url(), url)
        except EngineError as error:
            logger.warning("%s", error)

    def _part(self, url: str) -> str:
        return self._specs[url].part if url in self._specs else "whole"

    def _prefill_servers(self) -> list[dict[str, object]]:
        specs = {url: self._specs[url] for url in sorted(self._prefill)}
        return [{"url": url, "host": spec.host, "port": spec.bootstrap_port} for url, spec in specs.items()]

    def _tell_decode_servers(self) -> None:
        """One that cannot hear it is lost, and its successor will be told."""
        for url in sorted(self._decode):
            try:
                control.introduce(url, self._prefill_servers())
            except EngineError as error:
                logger.warning("%s", error)

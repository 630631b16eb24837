"""Ports for servers that are about to be started."""

from __future__ import annotations

import socket
import threading

from miles.core.errors import ConfigError

LOOPBACK = "127.0.0.1"
_given: set[int] = set()
"""What this process has given out: whoever got one may not listen yet."""
_giving = threading.Lock()


def free_ports(count: int, host: str = LOOPBACK) -> list[int]:
    """Ports of ``host`` that nobody listens on, none given twice; ConfigError when it is no address of this machine."""
    probes: list[socket.socket] = []
    ports: list[int] = []
    try:
        with _giving:
            while len(ports) < count:
                probes.append(socket.socket())
                port = _bound(probes[-1], host)
                if port not in _given:
                    _given.add(port)
                    ports.append(port)
        return ports
    finally:
        for probe in probes:
            probe.close()


def _bound(probe: socket.socket, host: str) -> int:
    try:
        probe.bind((host, 0))
    except OSError as error:
        raise ConfigError(
            f"no server can listen at {host}: {error}. Expected an address of this machine: that of --engine-host, or "
            "without it the one that Ray has of the node"
        ) from None
    port: int = probe.getsockname()[1]
    return port

"""A router as a server: put together, started, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.metadata
import logging
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import uvicorn

from miles.core.errors import ConfigError, PluginError
from miles.core.registry import Registry
from miles.router.control import ControlPlane
from miles.router.dispatcher import Dispatcher
from miles.router.extras import prepare_sessions
from miles.router.health import HealthMonitor
from miles.router.membership import Membership, read_text, read_workers_file
from miles.router.metrics import Metrics
from miles.router.middleware import load_middleware, wrap
from miles.router.middleware.handle import Handle
from miles.router.policies import Policy
from miles.router.protocol import RouterProtocol
from miles.router.settings import Settings
from miles.router.workers import Fleet, parse_worker

logger = logging.getLogger("miles.router")

_MAX_SWEEP_INTERVAL_S = 1.0
_BACKLOG = 16_384
_LAST_WORDS_S = 5
"""After ``--shutdown-timeout-s``, for refusals to reach their clients; then connections are cut."""
_UVICORN_TESTED = ((0, 34), (0, 54))
"""First and last minor version of uvicorn whose internals the fast path is tested with."""


class RouterServer:
    """One router.  ``serve`` runs until SIGTERM or ``stop``."""

    dispatcher: Dispatcher
    membership: Membership
    hot: bool
    """Whether requests may take the fast path; a middleware must see them all."""

    def __init__(self, settings: Settings) -> None:
        """Check all that can be checked before the start; raises ConfigError or PluginError."""
        self.settings = settings
        self._workers = [parse_worker(text) for text in settings.worker]
        if settings.workers_file is not None:
            read_workers_file(settings.workers_file)
        self._token = _read_token(settings)
        _check_certificate(settings)
        self._policy = _make_policy(settings)
        self._middleware = load_middleware(settings.middleware)
        self._make_sessions = prepare_sessions(settings) if settings.sessions else None
        self.hot = settings.hot_path == "auto" and not self._middleware
        self._failure: BaseException | None = None
        self._uvicorn: uvicorn.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ending_since: float | None = None

    async def serve(self, listener: socket.socket, on_start: Callable[[], None] = lambda: None) -> None:
        """Serve on ``listener`` until told to stop, then finish what is under way.

        ``on_start`` is called once nothing of the configuration can fail any more; before it ConfigError may be raised.
        """
        settings = self.settings
        fleet = Fleet(
            failure_threshold=settings.health_check_failure_threshold, readmission_checks=settings.readmission_checks
        )
        self.dispatcher = Dispatcher(settings, fleet, self._policy, Metrics())
        monitor = HealthMonitor(fleet, settings, self._fail)
        self.membership = Membership(fleet, self.dispatcher, monitor)
        control = ControlPlane(self.dispatcher, self.membership, self._token)
        app = control.application()
        sessions = self._make_sessions(self.dispatcher) if self._make_sessions is not None else None
        if sessions is not None:
            sessions.attach(app)
        wrapped = wrap(control.front(app), self._middleware, Handle(self.dispatcher))
        self._uvicorn = uvicorn.Server(self._uvicorn_config(wrapped))
        try:
            for url, weight in self._workers:
                self.membership.add(url, weight)
            if settings.workers_file is not None:
                self.membership.read_file(settings.workers_file, settings.drain_timeout_s)
            if not len(fleet):
                logger.warning("no worker yet: POST /add_worker?url=http://host:port adds one")
            on_start()
            self._own(self._sweep_forever())
            gc.freeze()  # what exists now stays: collections need not look at it again and again
            with _survived_signals(self._reload):
                await self._uvicorn.serve(sockets=[listener])
        finally:
            for task in self._tasks:
                task.cancel()
            self.membership.stop()
            self.dispatcher.stop()
            if sessions is not None:
                sessions.close()
            _let_go(self._uvicorn)
            await monitor.stop()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Stop accepting, finish what is under way, return from ``serve``."""
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True

    def _uvicorn_config(self, app: Any) -> uvicorn.Config:
        settings = self.settings
        protocol: Any = type("BoundRouterProtocol", (RouterProtocol,), {"owner": self})
        if not fast_path_fits(importlib.metadata.version("uvicorn")):
            logger.warning(
                "this version of uvicorn is untested: all requests take the slow path, without time limits for clients"
            )
            protocol = "httptools"
        return uvicorn.Config(
            app,
            http=protocol,
            interface="asgi3",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=int(settings.idle_timeout_s),
            timeout_graceful_shutdown=settings.shutdown_timeout_s + _LAST_WORDS_S,
            ssl_certfile=settings.tls_certificate,
            ssl_keyfile=settings.tls_key,
        )

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.append(task)
        task.add_done_callback(self._report)

    def _report(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """A background task broke: end the router with that error."""
        self._failure = error
        self.stop()

    async def _sweep_forever(self) -> None:
        loop = asyncio.get_running_loop()
        settings = self.settings
        limits_s = (settings.queue_timeout_s, settings.header_timeout_s, settings.stall_timeout_s)
        interval_s = min(_MAX_SWEEP_INTERVAL_S, *(limit_s / 4 for limit_s in limits_s))
        while True:
            await asyncio.sleep(interval_s)
            self.dispatcher.sweep()
            assert self._uvicorn is not None
            if self._uvicorn.should_exit:
                self._end_in_time(loop.time())
            connections = self._uvicorn.server_state.connections
            for connection in list(connections):
                if isinstance(connection, RouterProtocol):
                    connection.sweep(loop.time())

    def _end_in_time(self, now: float) -> None:
        """Refuse what has not finished ``--shutdown-timeout-s`` after the router was told to end."""
        if self._ending_since is None:
            self._ending_since = now
        elif now - self._ending_since > self.settings.shutdown_timeout_s:
            self.dispatcher.stop()

    def _reload(self) -> None:
        path = self.settings.workers_file
        if path is None:
            logger.warning("SIGHUP: there is no --workers-file to read again")
            return
        try:
            self.membership.read_file(path, self.settings.drain_timeout_s)
        except ConfigError as error:
            logger.error("SIGHUP: workers unchanged: %s", error)


def listen(settings: Settings) -> socket.socket:
    """The socket to serve on.  Raises ConfigError when the address cannot be taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(f"--host {settings.host} --port {settings.port}: cannot listen there ({error})") from error


def fast_path_fits(uvicorn_version: str) -> bool:
    """Whether the fast path is known to work inside this version of uvicorn."""
    major, minor = (int(part) for part in uvicorn_version.split(".")[:2])
    return _UVICORN_TESTED[0] <= (major, minor) <= _UVICORN_TESTED[1]


@contextlib.contextmanager
def _survived_signals(reload: Any) -> Iterator[None]:
    """Keep uvicorn from dying of the signal it was stopped with, so that the router can finish; SIGHUP reloads."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    loop.add_signal_handler(signal.SIGHUP, reload)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        for number, handler in before.items():
            signal.signal(number, handler)


def _let_go(server: uvicorn.Server) -> None:
    """Close what uvicorn left open because it was cancelled."""
    for listener in getattr(server, "servers", ()):
        listener.close()
    for connection in list(server.server_state.connections):
        connection.transport.abort()


def _check_certificate(settings: Settings) -> None:
    certificate, key = settings.tls_certificate, settings.tls_key
    if certificate is None or key is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"--tls-certificate {certificate} --tls-key {key}: expected a PEM certificate chain and its private key "
            f"({error.strerror or error})"
        ) from error


def _make_policy(settings: Settings) -> Policy:
    try:
        policy = Registry("miles.router_policies").get(settings.policy)
    except PluginError as error:
        raise ConfigError(f"--policy {settings.policy}: {error}") from error
    made: Policy = policy(settings)
    return made


def _read_token(settings: Settings) -> str | None:
    path = settings.control_token_file
    if path is None:
        return None
    token = read_text(path, "--control-token-file").strip()
    if not token:
        raise ConfigError(f"--control-token-file {path}: the file is empty; expected the token on one line")
    return token

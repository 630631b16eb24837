"""The control plane: workers, health, metrics, and commands that go to every worker."""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import uuid
from collections.abc import Awaitable
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from miles.core.errors import ConfigError
from miles.router.asgi import AsgiProxy
from miles.router.dispatcher import Dispatcher
from miles.router.fanout import FAN_OUT_PATHS, ONE_WORKER_PATHS, fan_out
from miles.router.membership import Membership
from miles.router.metrics import prometheus_text
from miles.router.targets import needs_asgi
from miles.router.workers import Worker, WorkerState

_MAX_PARAMETER_BYTES = 64 * 1024


class ControlPlane:
    """Handlers of the control endpoints."""

    def __init__(self, dispatcher: Dispatcher, membership: Membership, token: str | None) -> None:
        self._dispatcher = dispatcher
        self._settings = dispatcher.settings
        self._fleet = dispatcher.fleet
        self._membership = membership
        self._token = token

    def application(self) -> FastAPI:
        """The ASGI application: these endpoints, and the proxy for every other path."""
        app = FastAPI(openapi_url=None, redirect_slashes=False)
        app.include_router(self._open_routes())
        app.include_router(self._guarded_routes())
        app.router.default = AsgiProxy(self._dispatcher)
        app.add_exception_handler(ConfigError, _answer_config_error)
        return app

    def front(self, app: FastAPI) -> ASGIApp:
        """``app``, with a short cut to the proxy for requests that do not concern it."""
        proxy = AsgiProxy(self._dispatcher)

        def serve(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
            direct = scope["type"] == "http" and not needs_asgi(scope["raw_path"])
            return (proxy if direct else app)(scope, receive, send)

        return serve

    # Open to everybody.

    async def health(self) -> dict[str, Any]:
        """The router runs.  Whether it can serve is ``/readiness``."""
        return {"status": "ok", "ready_workers": len(self._fleet.ready), "workers": len(self._fleet)}

    async def readiness(self) -> JSONResponse:
        """200 when at least one worker gets requests, else 503."""
        ready = len(self._fleet.ready)
        return JSONResponse({"ready_workers": ready}, 200 if ready else 503)

    # Behind the token.

    async def add_worker(self, request: Request) -> dict[str, Any]:
        """Register ``?url=`` (or ``worker_url``, or the same in a JSON body), with an optional ``weight``."""
        named = await _parameters(request)
        self._add(named)
        return {"status": "success", "worker_urls": self._in_flight()}

    async def remove_worker(self, request: Request) -> dict[str, Any]:
        """Drain and forget a worker; answers when it is gone, after ``timeout_s`` at the latest."""
        named = await _parameters(request)
        worker = self._known(_url(named))
        return await self._remove(worker, named)

    async def list_workers(self) -> dict[str, Any]:
        """URLs of all workers."""
        return {"urls": [worker.url for worker in self._fleet]}

    async def workers(self) -> dict[str, Any]:
        """All workers in full."""
        return {"workers": [_describe(worker) for worker in self._fleet], "total": len(self._fleet)}

    async def create_worker(self, request: Request) -> dict[str, Any]:
        """Register a worker: ``{"url": ..., "weight": 1}``."""
        worker = self._add(await _parameters(request))
        return {"status": "accepted", "worker_id": _identity(worker), "url": worker.url}

    async def worker(self, name: str) -> dict[str, Any]:
        """One worker, by identity or URL."""
        return _describe(self._known(name))

    async def delete_worker(self, name: str, request: Request) -> dict[str, Any]:
        """Drain and forget one worker, by identity or URL."""
        return await self._remove(self._known(name), dict(request.query_params))

    async def metrics(self) -> PlainTextResponse:
        """Counters for Prometheus."""
        text = prometheus_text(self._dispatcher.metrics, self._fleet, len(self._dispatcher.waiting))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def status(self) -> dict[str, Any]:
        """Everything about the router, for people."""
        metrics = self._dispatcher.metrics
        return {
            "policy": self._settings.policy,
            "weight_version": self._fleet.weight_version,
            "in_flight": self._dispatcher.in_flight,
            "queue_length": len(self._dispatcher.waiting),
            "requests": {"received": metrics.received, "retried": metrics.retries, **metrics.outcomes},
            "workers": [_describe(worker) for worker in self._fleet],
        }

    async def fan_out(self, request: Request) -> JSONResponse:
        """Send the request to every worker that is not quarantined; 502 unless all succeed."""
        workers = [worker for worker in self._fleet if worker.state is not WorkerState.QUARANTINED]
        if not workers:
            raise HTTPException(503, "no worker to send this to")
        path = request.url.path
        if path in ONE_WORKER_PATHS and len(workers) > 1:
            raise HTTPException(
                409, f"{path} needs a body of its own for each worker: send it to the workers themselves"
            )
        headers = [field for field in request.headers.raw if not (self._token and field[0] == b"authorization")]
        query = f"?{request.url.query}" if request.url.query else ""
        body = await _body(request, self._settings.max_body_bytes)
        timeout_s = self._settings.request_timeout_s
        result = await fan_out(workers, request.method, path + query, headers, body, timeout_s)
        for worker in self._fleet:
            worker.wake.set()  # its weight version may have changed
        return JSONResponse(result, 200 if result["success"] else 502)

    # Inside.

    def _open_routes(self) -> APIRouter:
        routes = APIRouter()
        routes.get("/health")(self.health)
        routes.get("/liveness")(self.health)
        routes.get("/readiness")(self.readiness)
        return routes

    def _guarded_routes(self) -> APIRouter:
        routes = APIRouter(dependencies=[Depends(self._authorize)])
        routes.post("/add_worker")(self.add_worker)
        routes.post("/remove_worker")(self.remove_worker)
        routes.get("/list_workers")(self.list_workers)
        routes.get("/workers")(self.workers)
        routes.post("/workers", status_code=202)(self.create_worker)
        routes.get("/workers/{name:path}")(self.worker)
        routes.delete("/workers/{name:path}")(self.delete_worker)
        routes.get("/metrics")(self.metrics)
        routes.get("/router/status")(self.status)
        for path in sorted(FAN_OUT_PATHS):
            routes.api_route(path, methods=["GET", "POST"])(self.fan_out)
        return routes

    async def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if self._token is not None and not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            raise HTTPException(401, "control requests need the token", {"WWW-Authenticate": "Bearer"})

    def _add(self, named: dict[str, Any]) -> Worker:
        kind = named.get("worker_type", "regular")
        if kind != "regular":
            raise HTTPException(400, f"worker_type {kind!r}: only 'regular' workers are supported")
        weight = named.get("weight")
        try:
            return self._membership.add(_url(named), None if weight is None else float(weight))
        except (TypeError, ValueError):
            raise HTTPException(400, f"weight {weight!r}: expected a number") from None

    async def _remove(self, worker: Worker, named: dict[str, Any]) -> dict[str, Any]:
        timeout = named.get("timeout_s", self._settings.drain_timeout_s)
        try:
            timeout_s = float(timeout)
        except (TypeError, ValueError):
            timeout_s = math.nan
        if not timeout_s >= 0:
            raise HTTPException(400, f"timeout_s {timeout!r}: expected a number of seconds")
        late = await self._membership.remove(worker, timeout_s)
        return {"status": "success", "worker_urls": self._in_flight(), "not_drained": late}

    def _known(self, name: str) -> Worker:
        for worker in self._fleet:
            if name in (worker.url, _identity(worker)):
                return worker
        with contextlib.suppress(ConfigError):
            worker_or_none = self._fleet.get(name)
            if worker_or_none is not None:
                return worker_or_none
        raise HTTPException(404, f"no worker {name!r}")

    def _in_flight(self) -> dict[str, int]:
        return {worker.url: worker.in_flight for worker in self._fleet}


def _identity(worker: Worker) -> str:
    """Stable name of a worker in ``/workers/{id}``."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, worker.url))


def _describe(worker: Worker) -> dict[str, Any]:
    return {
        "id": _identity(worker),
        "url": worker.url,
        "state": worker.state,
        "reason": worker.reason,
        "is_healthy": worker.state is WorkerState.HEALTHY,
        "draining": worker.draining,
        "weight": worker.weight,
        "weight_version": worker.weight_version,
        "in_flight": worker.in_flight,
        "answers": {f"{hundreds}xx": worker.statuses[hundreds] for hundreds in range(2, 6)},
        "failures": dict(worker.failures),
    }


async def _parameters(request: Request) -> dict[str, Any]:
    """Query parameters, else the members of a JSON object in the body."""
    if request.query_params:
        return dict(request.query_params)
    try:
        named = json.loads(await _body(request, _MAX_PARAMETER_BYTES))
    except (ValueError, RecursionError):
        named = None
    if not isinstance(named, dict):
        raise HTTPException(400, "expected ?url=http://host:port, or a JSON object with 'url'")
    return named


async def _body(request: Request, limit: int) -> bytes:
    """The whole body, if it is not longer than ``limit`` bytes."""
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > limit:
            raise HTTPException(413, f"request body above {limit} bytes")
        pieces.append(piece)
    return b"".join(pieces)


def _url(named: dict[str, Any]) -> str:
    url = named.get("url") or named.get("worker_url")
    if not isinstance(url, str):
        raise HTTPException(400, "'url' (or 'worker_url') is missing: expected http://host:port")
    return url


async def _answer_config_error(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, 400)

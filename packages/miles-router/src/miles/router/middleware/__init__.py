"""Middleware: ASGI applications around the router, given by ``--middleware``.

A middleware is a class that takes the application inside it and a handle of the router, and is itself an ASGI
application (https://asgi.readthedocs.io).  It may answer a request, change it on its way in, or change the answer on
its way out::

    class Stamp:
        def __init__(self, app: ASGIApp, *, router: RouterHandle) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def stamped(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"x-stamp", b"1")]
                await send(message)

            await self.app(scope, receive, stamped)

It sees every request, those to the control plane included; bodies arrive in pieces and should be passed on in pieces.
Its own state may be plain attributes: all requests are served in one event loop.
"""

from miles.router.middleware.loading import load_middleware, wrap
from miles.router.middleware.protocols import Middleware, RouterHandle, WorkerView

__all__ = ["Middleware", "RouterHandle", "WorkerView", "load_middleware", "wrap"]

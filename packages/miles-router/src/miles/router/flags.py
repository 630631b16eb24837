"""Flags of the router inside a run.  Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from miles.core.config.group import Flag, Group


class Router(Group):
    title = "Miles Router"

    use_miles_router: bool = False
    """Use this router rather than SGLang's. Runs start it in any case so far."""

    miles_router_middleware_paths: Annotated[list[str], Flag(plugin="miles.router_middlewares")] = Field(
        default_factory=list
    )
    """ASGI middleware classes around the router, by name or dotted path, outermost first. They see every request, which
    then costs more than without any."""

    miles_router_policy: Annotated[str, Flag(plugin="miles.router_policies")] = "least_loaded"
    """Which engine gets a request."""

    use_session_server: bool = False
    """Let the router serve `/sessions`: OpenAI-compatible chat for agents, recorded token by token."""

    miles_router_timeout: PositiveFloat | None = None
    """Seconds after which a request to an engine fails. Defaults to no limit."""

    miles_router_max_connections: PositiveInt | None = None
    """Most connections to the engines."""

    miles_router_health_check_failure_threshold: PositiveInt = 3
    """Failed health checks in a row after which an engine gets no more requests."""


GROUPS: tuple[type[Group], ...] = (Router,)

"""What a router can be told.  One field is one command-line flag; its docstring is its help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)


def _json_object(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError("expected a JSON object") from None


class Settings(BaseModel):
    """Everything about one router; read-only."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address to listen on.  Only this machine can reach the default."""

    port: int = Field(default=30000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one and prints it."""

    worker: tuple[str, ...] = ()
    """Workers to start with: ``http://host:port``, or ``http://host:port=2`` for twice the weight."""

    workers_file: Path | None = None
    """File with one worker per line, read at the start and on SIGHUP: new ones are added, missing ones drained."""

    policy: str = "least_loaded"
    """Who gets a request: least_loaded, round_robin, power_of_two, weighted, sticky, cache_aware, a name of the
    ``miles.router_policies`` entry points, or a dotted path to a class."""

    session_header: str = Field(default="x-smg-routing-key", pattern=r"^[!#$%&'*+\-.^_`|~0-9A-Za-z]+$")
    """Header that names a session, for the sticky policy."""

    load_factor: float = Field(default=1.25, ge=1.0)
    """A sticky worker takes a request while it has at most this many times the average number in flight."""

    balance_threshold: NonNegativeInt = 32
    """cache_aware leaves the worker that knows the prefix when it has this many requests more in flight than the least
    loaded one."""

    max_connections: PositiveInt | None = None
    """Most requests in flight at all workers together; more wait in the queue.  Default: no limit."""

    max_in_flight_per_worker: PositiveInt | None = None
    """Most requests in flight at one worker; more wait in the queue.  Default: no limit."""

    queue_size: NonNegativeInt = 10_000
    """Requests that may wait for a worker; the next one is answered 503 with Retry-After."""

    queue_timeout_s: PositiveFloat = 60.0
    """Longest wait for a worker, then 503 with Retry-After."""

    request_timeout_s: PositiveFloat | None = 14_400.0
    """Longest time from a request's head to the end of its answer, then 504 (or a cut answer, if it had begun)."""

    connect_timeout_s: PositiveFloat = 5.0
    """Longest wait for a connection to a worker."""

    max_attempts: PositiveInt = 3
    """How often one request may be sent to workers.  Never again once part of an answer went to the client."""

    look_ahead_bytes: NonNegativeInt = 64 * 1024
    """Bytes of an answer of known length that are held back, so that a worker that dies meanwhile can be replaced."""

    buffered_body_bytes: PositiveInt = 1024 * 1024
    """Longest request body that is kept to be sent again; a longer one passes through as it arrives, and only once."""

    health_check_path: str = Field(default="/health", pattern=r"^/[!-~]*$")
    """Path that answers 200 while a worker is well."""

    health_check_interval_s: PositiveFloat = 5.0
    """Pause between two health checks of a healthy worker; the others are checked more often."""

    health_check_timeout_s: PositiveFloat = 5.0
    """Longest wait for the answer to a health check."""

    health_check_failure_threshold: PositiveInt = 3
    """Failures in a row, of health checks or of requests, that put a worker into quarantine."""

    readmission_checks: PositiveInt = 2
    """Good health checks in a row that bring a worker back from quarantine."""

    drain_timeout_s: PositiveFloat = 60.0
    """How long a worker that is removed may finish its requests."""

    shutdown_timeout_s: PositiveInt = 60
    """How long requests may finish after SIGTERM."""

    max_header_bytes: PositiveInt = 64 * 1024
    """Longest request head."""

    max_body_bytes: PositiveInt = 1024 * 1024 * 1024
    """Longest request body."""

    header_timeout_s: PositiveFloat = 10.0
    """Longest time for a client to send a request head."""

    stall_timeout_s: PositiveFloat = 120.0
    """Longest time for a client to send or take nothing while it is its turn."""

    idle_timeout_s: PositiveFloat = 75.0
    """How long a client's connection without a request is kept."""

    worker_idle_timeout_s: PositiveFloat = 4.0
    """How long an unused connection to a worker is kept; less than the worker's own limit."""

    control_token_file: Path | None = None
    """File with a token that control requests must carry as ``Authorization: Bearer``.  Default: no token."""

    tls_certificate: Path | None = None
    """Certificate chain; with it the router speaks HTTPS."""

    tls_key: Path | None = None
    """Private key of the certificate."""

    hot_path: Literal["auto", "off"] = "auto"
    """``off`` serves every request through ASGI; ``auto`` does so only where the fast path does not fit."""

    middleware: tuple[str, ...] = ()
    """ASGI middleware around the router, outermost first: names of the ``miles.router_middlewares`` entry points, or
    dotted paths to classes.  All requests then take the slow path."""

    radix_cache_tokens: PositiveInt = 4_000_000
    """Tokens that the middleware radix_cache remembers; about 40 bytes each."""

    tokenizer: Path | None = None
    """Directory of a checkpoint with tokenizer.json, for sessions and for middleware that handles text."""

    sessions: bool = False
    """Serve ``/sessions``: chat completions for agents, recorded token by token.  Needs ``--tokenizer``."""

    session_chat_template: Path | None = None
    """Jinja file in place of the checkpoint's chat template."""

    session_template_kwargs: Annotated[dict[str, Any], BeforeValidator(_json_object)] = Field(default_factory=dict)
    """Variables of the chat template in every session, as JSON: ``{"enable_thinking": false}``."""

    session_tool_parser: str = "auto"
    """How the model writes tool calls: a name of the ``miles.tool_parsers`` entry points, a dotted path, ``none``, or
    ``auto`` for what the chat template shows."""

    session_reasoning: Literal["auto", "off"] = "auto"
    """``auto`` answers what ends with ``</think>`` as ``reasoning_content``; ``off`` leaves it in the content."""

    session_routed_experts: bool = False
    """Ask the engines for the experts of each token, and put them into the samples."""

    max_sessions: PositiveInt = 10_000
    """Sessions that may be open; the next one is answered 503 with Retry-After."""

    session_idle_timeout_s: PositiveFloat = 3600.0
    """How long an unused session is kept when its place is needed."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What goes to standard error."""

    @model_validator(mode="after")
    def _tls_is_complete(self) -> Settings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("--tls-certificate and --tls-key are given together or not at all")
        return self

"""``remote_rm``: ask a reward service over HTTP.

``POST --rm-url`` with ``{"prompt", "response", "label", "metadata"}``; the answer is the reward, a JSON number or
object. Connections are reused, and at most ``--rm-concurrency`` requests are on their way.  What may pass (no
connection, no answer in time, 408, 425, 429, 5xx) is tried again, after waiting as ``Retry-After`` says or
exponentially longer with jitter, until ``--rm-timeout`` (120 s) is over; anything else fails at once.
With ``--use-distributed-post`` several processes send (see ``miles.rewards.senders``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from miles.core.errors import ConfigError
from miles.rewards.client import Client
from miles.rewards.context import Context, Settings
from miles.rewards.senders import Senders
from miles.rewards.verdict import failed

if TYPE_CHECKING:
    from miles.core.protocols.reward import RewardOutcome, Score
    from miles.core.types.sample import Sample


@dataclass(frozen=True)
class Remote:
    """The reward type."""

    name: str = "remote_rm"

    def scorer(self, context: Context) -> RemoteScorer:
        if problem := problem_with(context.settings.url):
            raise ConfigError(problem)
        return RemoteScorer(context.settings)

    async def __call__(self, args: Any, sample: Sample, **kwargs: Any) -> Score:
        scorer = RemoteScorer(Settings(url=args.rm_url, http_proxy=args.http_proxy))
        try:
            return (await scorer.score(sample)).score
        finally:
            await scorer.close()


def problem_with(url: str | None) -> str:
    """Why ``--rm-url`` cannot be the address of a reward service; empty when it can."""
    if not url:
        return "--rm-type remote_rm needs --rm-url, the address of the reward service"
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    return "" if fits else f"--rm-url {url!r}: expected an address like http://host:port/path"


class RemoteScorer:
    """Asks the service.  Serves one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._service = Senders(settings) if settings.num_senders else _client(settings)

    async def score(self, sample: Sample) -> RewardOutcome:
        request = {
            "prompt": sample.prompt,
            "response": sample.response,
            "label": sample.label,
            "metadata": sample.metadata,
        }
        try:
            body = json.dumps(request).encode()
        except (TypeError, ValueError) as error:
            return failed("error", f"label or metadata is not JSON: {error}", 0.0)
        return await self._service.ask(body)

    async def close(self) -> None:
        await self._service.close()


def _client(settings: Settings) -> Client:
    return Client(
        settings.url or "",
        timeout_s=settings.timeout_s,
        concurrency=settings.concurrency,
        http_proxy=settings.http_proxy,
    )


reward = Remote()

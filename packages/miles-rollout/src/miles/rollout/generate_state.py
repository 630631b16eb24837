"""What generate functions and hooks find at run time: the configuration, the router, the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from miles.core.protocols.tools import ToolSpec
from miles.core.types.sample import Sample
from miles.rollout.generators.experts import ExpertShape
from miles.rollout.http import JsonClient
from miles.rollout.text import ChatTokenizer

if TYPE_CHECKING:
    from miles.core.config import Config
    from miles.rollout.runtime import Runtime


class RolloutArgs:
    """The ``args`` of rollout functions and hooks: every flag by its flat name, from the configuration.

    In addition what is known only once the servers run.  A copy in another process has the addresses only.
    """

    sglang_router_ip: str | None
    sglang_router_port: int | None
    """Of the router in use, whoever started it."""
    generate_state: GenerateState
    """What generate functions work with."""
    runtime: Runtime
    """What rollout functions work with."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":
            raise AttributeError(name)
        # A configuration does not change: the next look at this flag, one of many for every sample, finds it here.
        value = self.__dict__[name] = getattr(self._config, name)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        addresses = {name: value for name, value in self.__dict__.items() if name.startswith("sglang_router")}
        return _rebuild, (self._config, addresses)


def _rebuild(config: Config, addresses: dict[str, Any]) -> RolloutArgs:
    args = RolloutArgs(config)
    args.__dict__.update(addresses)
    return args


class GenerateState:
    """What a generate function works with, besides its sample."""

    def __init__(self, args: RolloutArgs, text: ChatTokenizer, client: JsonClient) -> None:
        self.args = args
        self.text = text
        self.client = client
        self.processor = None
        self.experts: ExpertShape | None = None
        """What routed experts look like, when engines are to return them (``--use-rollout-routing-replay``)."""
        self.aborted = False
        """Set while surplus work is being ended: a generate function of several turns should stop."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        return self.text.hf

    def prompt_ids(self, sample: Sample, tools: Sequence[ToolSpec] | None = None) -> list[int]:
        """Token ids of the sample's prompt; the chat template is applied to messages with ``tools`` or its own."""
        if isinstance(sample.prompt, str):
            return self.text.encode(sample.prompt)
        known = list(tools or sample.metadata.get("tools") or ()) or None
        rendered = self.text.render(sample.prompt, tools=known, **self.args.apply_chat_template_kwargs)
        return self.text.encode(rendered)

"""Sessions of the router: an OpenAI-compatible address that records what the engines sampled."""

from __future__ import annotations

import json
import logging
from types import TracebackType
from typing import TYPE_CHECKING, Any

import orjson
from safetensors.numpy import load

from miles.core.errors import EngineError, RolloutError
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.data import Data
from miles.core.types.sample import Sample
from miles.rollout.flags import MultiTurn
from miles.rollout.generators.experts import ExpertShape
from miles.rollout.http import JsonClient, RequestError

if TYPE_CHECKING:
    from miles.core.config import Config

logger = logging.getLogger(__name__)

_META = "_samples_meta"
_ARRAYS = ("tokens", "loss_mask", "rollout_log_probs", "token_weight_versions")


def router_flags(config: Config) -> list[str]:
    """What the run's router is told about sessions; nothing when it offers none."""
    if not config.use_session_server:
        return []
    flags = ["--sessions", "--session-tool-parser", config[MultiTurn].generate_tool_call_parser or "auto"]
    if config[Data].apply_chat_template_kwargs:
        flags += ["--session-template-kwargs", json.dumps(config[Data].apply_chat_template_kwargs)]
    return [*flags, "--session-routed-experts"] if config[Algorithm].use_rollout_routing_replay else flags


class Session:
    """One conversation of an agent, for the length of an ``async with``."""

    def __init__(self, client: JsonClient) -> None:
        self._client = client
        self._path = ""

    @property
    def url(self) -> str:
        """What an agent talks to: ``URL/v1/chat/completions``."""
        return self._client.base_url + self._path

    async def __aenter__(self) -> Session:
        try:
            answer = await self._client.post("/sessions", {})
        except RequestError as error:
            raise RolloutError(
                f"the router at {self._client.base_url} opens no sessions: {error}. A router that was started by hand "
                "needs --sessions and --tokenizer"
            ) from error
        self._path = f"/sessions/{answer['session_id']}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._client.fetch("DELETE", self._path)
        except EngineError as problem:
            logger.warning("a session was not closed: %s", problem)

    async def samples(self, max_seq_len: int | None, experts: ExpertShape | None) -> list[Sample]:
        """What was recorded, as training samples; an empty list when no turn was."""
        body = orjson.dumps({"max_seq_len": max_seq_len})
        return read_samples(await self._client.fetch("POST", f"{self._path}/samples", body), experts)


def read_samples(content: bytes, experts: ExpertShape | None) -> list[Sample]:
    """Samples from the router's safetensors: ``NAME.i`` of sample ``i``, and the JSON of what is not an array."""
    tensors = load(content)
    described: list[dict[str, Any]] = orjson.loads(tensors[_META].tobytes())
    samples = []
    for number, values in enumerate(described):
        arrays = {name: tensors.get(f"{name}.{number}") for name in _ARRAYS}
        sample = Sample.from_dict(
            values | {name: array.tolist() for name, array in arrays.items() if array is not None}
        )
        routed = tensors.get(f"rollout_routed_experts.{number}")
        if experts is not None and routed is not None:
            sample.rollout_routed_experts = routed.reshape(-1, experts.layers, experts.per_token)
        sample.validate()
        samples.append(sample)
    return samples

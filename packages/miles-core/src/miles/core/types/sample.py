"""One response and everything known about it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt


class Status(StrEnum):
    """How far a sample's generation came."""

    PENDING = "pending"
    """Not generated yet."""
    COMPLETED = "completed"
    """Ended by an end-of-text token or a stop condition."""
    TRUNCATED = "truncated"
    """Cut at the length limit."""
    ABORTED = "aborted"
    """Cut by an abort; its tokens are valid and generation may be resumed."""
    FAILED = "failed"
    """Could not be generated; ``metadata["error"]`` says why."""


_Status: TypeAlias = Status  # inside Sample the name is taken
_STATUS_OF_FINISH_REASON = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}


@dataclass(slots=True)
class SpecInfo:
    """Speculative decoding counts, summed over the engine calls of a sample."""

    accepted_tokens: int = 0
    draft_tokens: int = 0
    verify_steps: int = 0
    completion_tokens: int = 0

    @property
    def accept_rate(self) -> float:
        """Share of drafted tokens that were accepted."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else 0.0

    @property
    def accept_length(self) -> float:
        """Tokens gained per verification step."""
        return self.completion_tokens / self.verify_steps if self.verify_steps else 0.0


@dataclass(slots=True)
class PrefixCacheInfo:
    """Prompt tokens, and how many of them the engine found in its prefix cache."""

    cached_tokens: int = 0
    prompt_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass(slots=True)
class Sample:
    """One response to one prompt.

    R = response tokens, T = prompt + response tokens.
    """

    Status: ClassVar = Status  # hooks write Sample.Status.COMPLETED

    group_index: int | None = None
    """Index of the prompt group; counts up over the whole run."""
    index: int | None = None
    """Index of the sample; counts up over the whole run."""
    rollout_id: int | None = None
    """Shared by the samples of one execution when a generator returns several; None: ``index``."""
    prompt: str | list[dict[str, Any]] = ""
    """Text (chat template applied) or OpenAI messages."""
    tokens: list[int] = field(default_factory=list)
    """Prompt and response token ids, T of them."""
    response: str = ""
    """Text of the response tokens."""
    response_length: int = 0
    """R, tool and environment tokens included."""
    label: Any = None
    """Ground truth for the reward."""
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None
    """R entries, 1 = trains.  None: all of them."""
    rollout_log_probs: list[float] | None = None
    """R natural-log probabilities under the engine; 0.0 on tokens that were not sampled."""
    teacher_log_probs: list[float] | None = None
    """R natural-log probabilities under a distillation teacher."""
    weight_versions: list[str] = field(default_factory=list)
    """Weight version of each engine call, in order."""
    token_weight_versions: list[int] | None = None
    """R weight versions, one per response token."""
    rollout_routed_experts: npt.NDArray[np.int32] | None = None
    """[T - 1, layers, experts per token], as the engine routed them: row t holds what token t used.

    All decoder layers count, rows of dense ones mean nothing; experts of a token are in no certain order.  The last
    token was never computed.
    """
    multimodal_inputs: dict[str, Any] | None = None
    multimodal_train_inputs: dict[str, Any] | None = None
    remove_sample: bool = False
    """Mask the whole sample out of the loss; it still counts in its group's reward statistics."""
    status: _Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    train_metadata: dict[str, Any] | None = None
    generate_function_path: str | None = None
    """Generator of this sample alone, by name or dotted path."""
    routing_key: str | None = None
    """Sent as ``X-SMG-Routing-Key``: samples with one key go to one engine."""
    non_generation_time: float = 0.0
    """Seconds spent in tools and environments."""
    spec_info: SpecInfo = field(default_factory=SpecInfo)
    prefix_cache_info: PrefixCacheInfo = field(default_factory=PrefixCacheInfo)

    @property
    def prompt_length(self) -> int:
        """Number of prompt tokens."""
        return len(self.tokens) - self.response_length

    @property
    def response_tokens(self) -> list[int]:
        """The R response token ids."""
        return self.tokens[self.prompt_length :]

    @property
    def effective_response_length(self) -> int:
        """Response tokens that train."""
        return self.response_length if self.loss_mask is None else sum(self.loss_mask)

    def reward_value(self, key: str | None) -> float:
        """The scalar reward: the reward itself, or its entry ``key`` when it is a mapping."""
        if isinstance(self.reward, dict):
            if key is None or key not in self.reward:
                raise ValueError(
                    f"sample {self.index}: the reward is a mapping with the keys {sorted(self.reward)}; "
                    f"set --reward-key to one of them (it is {key!r})"
                )
            return float(self.reward[key])
        if self.reward is None:
            raise ValueError(f"sample {self.index} has no reward (status {self.status.value})")
        return float(self.reward)

    def get_reward_value(self, args: Any) -> float:
        """The scalar reward under ``args.reward_key``; for users' hooks."""
        return self.reward_value(args.reward_key)

    def finish(self, reason: str | None) -> None:
        """Set the status from an engine's finish reason (``stop``, ``length``, ``abort``)."""
        self.status = _STATUS_OF_FINISH_REASON.get(reason or "", self.status)

    def reset_for_retry(self) -> None:
        """Forget what was generated; keep identity, prompt, label, metadata and how to generate."""
        kept = {
            *("group_index", "index", "rollout_id", "prompt", "label", "metadata", "multimodal_inputs"),
            *("routing_key", "generate_function_path"),
        }
        fresh = Sample()
        for spec in dataclasses.fields(self):
            if spec.name not in kept:
                setattr(self, spec.name, getattr(fresh, spec.name))

    def validate(self) -> None:
        """Raise ValueError when lengths disagree."""
        lengths = {
            "loss_mask": self.loss_mask,
            "rollout_log_probs": self.rollout_log_probs,
            "teacher_log_probs": self.teacher_log_probs,
            "token_weight_versions": self.token_weight_versions,
        }
        for name, values in lengths.items():
            if values is not None and len(values) != self.response_length:
                raise ValueError(
                    f"sample {self.index}: {name} has {len(values)} entries, "
                    f"the response has {self.response_length} tokens"
                )
        if self.response_length > len(self.tokens):
            raise ValueError(
                f"sample {self.index}: response_length is {self.response_length}, "
                f"but there are {len(self.tokens)} tokens"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values only (arrays stay arrays); the inverse of ``from_dict``."""
        data = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        data["status"] = self.status.value
        data["spec_info"] = dataclasses.asdict(self.spec_info)
        data["prefix_cache_info"] = dataclasses.asdict(self.prefix_cache_info)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sample:
        """Rebuild a sample; unknown keys go to ``metadata``."""
        known = {spec.name for spec in dataclasses.fields(cls)}
        values = {name: value for name, value in data.items() if name in known}
        values["status"] = Status(values.get("status", Status.PENDING))
        if isinstance(values.get("spec_info"), dict):
            values["spec_info"] = SpecInfo(**values["spec_info"])
        if isinstance(values.get("prefix_cache_info"), dict):
            values["prefix_cache_info"] = PrefixCacheInfo(**values["prefix_cache_info"])
        sample = cls(**values)
        extra = {name: value for name, value in data.items() if name not in known}
        if extra:
            sample.metadata = {**sample.metadata, **extra}
        return sample


Group = list[Sample]
"""The samples of one prompt."""

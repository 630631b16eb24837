"""From a trajectory to training samples: only sampled tokens train."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from miles.router.sessions.trajectory import Turn
from miles.router.tokenizer import CheckpointTokenizer

_STATUS_OF_FINISH = {"stop": "completed", "length": "truncated", "abort": "aborted"}


class SampleError(ValueError):
    """The recorded turns do not make a sample.  Says which turn and why."""


@dataclass(slots=True)
class TrainingSample:
    """One trajectory.  T = all tokens, R = those after the first prompt."""

    tokens: list[int]
    """T token ids."""
    loss_mask: list[int] = field(default_factory=list)
    """R entries, 1 = sampled."""
    rollout_log_probs: list[float] = field(default_factory=list)
    """R natural-log probabilities; 0.0 where nothing was sampled."""
    token_weight_versions: list[int] | None = field(default_factory=list)
    """R weight versions; None when they are not whole numbers."""
    routed_experts: array[int] | None = None
    """``T - 1`` rows of int32, one after the other."""
    status: str = "completed"
    response: str = ""
    weight_versions: list[str] = field(default_factory=list)
    cached_tokens: int = 0
    prompt_tokens: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """Everything but the arrays, under the names of ``miles.core.types.sample.Sample``."""
        cache = {"cached_tokens": self.cached_tokens, "prompt_tokens": self.prompt_tokens}
        return {
            "status": self.status,
            "response": self.response,
            "response_length": len(self.loss_mask),
            "weight_versions": self.weight_versions,
            "prefix_cache_info": cache,
            "metadata": self.metadata,
        }

    def as_json(self) -> dict[str, Any]:
        """What ``Sample.from_dict`` takes."""
        return self.described() | {
            "tokens": self.tokens,
            "loss_mask": self.loss_mask,
            "rollout_log_probs": self.rollout_log_probs,
            "token_weight_versions": self.token_weight_versions,
        }


def assemble(
    turns: Sequence[Turn], tokenizer: CheckpointTokenizer, max_seq_len: int | None = None
) -> list[TrainingSample]:
    """One sample of ``turns``, or none.  Raises SampleError.

    It ends with the first turn that was cut.  The turn that makes it longer than ``max_seq_len`` tokens is cut there;
    one whose prompt leaves no room is left out.  Either way the status is ``truncated``.
    """
    if not turns:
        return []
    sample = TrainingSample(list(turns[0].added))
    for number, turn in enumerate(turns):
        num_prompt_tokens = len(sample.tokens) + (len(turn.added) - turn.trimmed if number else 0)
        if max_seq_len is not None and num_prompt_tokens >= max_seq_len:
            sample.status = "truncated"
            break
        if number:
            _append_environment(sample, turn)
        _append_generation(sample, number, turn)
        if max_seq_len is not None and len(sample.tokens) > max_seq_len:
            _cut(sample, max_seq_len)
            break
        if sample.status != "completed":
            break
    sample.response = _response_text(sample, tokenizer)
    sample.metadata = {"num_turns": len(turns)}
    return [sample]


def _append_environment(sample: TrainingSample, turn: Turn) -> None:
    """What the agent said: in the sequence, but not trained on."""
    if turn.trimmed:
        _cut(sample, len(sample.tokens) - turn.trimmed, "completed")
    count = len(turn.added)
    sample.tokens += turn.added
    sample.loss_mask += [0] * count
    sample.rollout_log_probs += [0.0] * count
    if sample.token_weight_versions is not None:
        known = turn.generation.token_versions
        sample.token_weight_versions += [known[0] if known else 0] * count


def _append_generation(sample: TrainingSample, number: int, turn: Turn) -> None:
    generation = turn.generation
    count = len(generation.output)
    sample.prompt_tokens += len(sample.tokens)
    sample.cached_tokens += generation.cached_tokens
    sample.tokens += generation.output
    sample.loss_mask += [1] * count
    sample.rollout_log_probs += generation.logps
    sample.weight_versions += generation.versions
    if sample.token_weight_versions is None or generation.token_versions is None:
        sample.token_weight_versions = None
    else:
        sample.token_weight_versions += generation.token_versions
    sample.status = _STATUS_OF_FINISH[generation.finish]
    _append_experts(sample, number, generation.routed_experts)


def _append_experts(sample: TrainingSample, number: int, encoded: str | None) -> None:
    """Rows of the tokens that this turn brought: earlier ones keep those they were sampled with."""
    if encoded is None:
        if sample.routed_experts is not None:
            raise SampleError(f"turn {number} has no routed experts, earlier turns have")
        return
    if number and sample.routed_experts is None:
        raise SampleError(f"turn {number} has routed experts, earlier turns have none")
    values = array("i", base64.b64decode(encoded))
    num_rows = len(sample.tokens) - 1
    width = len(values) // num_rows if num_rows else 0
    # A request that ends at a stop string can come with one row more.
    if not width or len(values) - width * num_rows not in (0, width):
        raise SampleError(f"turn {number}: {len(values)} routed experts do not divide into {num_rows} rows")
    rows = sample.routed_experts if sample.routed_experts is not None else array("i")
    rows.extend(values[len(rows) : num_rows * width])
    sample.routed_experts = rows


def _cut(sample: TrainingSample, length: int, status: str = "truncated") -> None:
    """Make the sample ``length`` tokens long."""
    sample.status = status
    dropped = len(sample.tokens) - length
    num_rows = len(sample.tokens) - 1
    if sample.routed_experts is not None and num_rows:
        del sample.routed_experts[(length - 1) * (len(sample.routed_experts) // num_rows) :]
    for values in (sample.tokens, sample.loss_mask, sample.rollout_log_probs, sample.token_weight_versions):
        if values is not None:
            del values[len(values) - dropped :]


def _response_text(sample: TrainingSample, tokenizer: CheckpointTokenizer) -> str:
    """Text of the response; the special token that ends it is left out."""
    ids = sample.tokens[len(sample.tokens) - len(sample.loss_mask) :] if sample.loss_mask else []
    if ids and ids[-1] in tokenizer.special_ids:
        ids = ids[:-1]
    return tokenizer.decode(ids)

"""Supervised fine-tuning: a rollout is the next conversations of the data, with a mask over what assistants wrote."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from miles.core.errors import ConfigError, DataError
from miles.core.protocols.rollout import DataSource
from miles.core.types.rollout import RolloutFnEvalOutput, RolloutFnTrainOutput
from miles.core.types.sample import Group, Sample, Status
from miles.rollout.data.prompts import Messages
from miles.rollout.loss_mask import LossMasks, MaskType
from miles.rollout.text import load_tokenizer


def generate_rollout(
    args: Any, rollout_id: int, data_source: DataSource, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """One batch of conversations.

    A prompt is a list of messages, or text with the answer in ``--label-key``.  Conversations longer than
    ``--rollout-max-context-len`` are cut there and counted as truncated.
    """
    if evaluation:
        raise ConfigError(
            "--eval-function-path: supervised fine-tuning has no evaluation of its own; give --eval-function-path "
            "sglang, which starts an engine, or leave --eval-interval out"
        )
    groups = data_source.get_samples(args.rollout_batch_size)
    samples = [_only_sample(group) for group in groups]
    masks = _loss_masks(args.hf_checkpoint, args.loss_mask_type)
    try:
        encoded = masks([(conversation(sample), sample.metadata.get("tools")) for sample in samples])
    except ValueError as error:
        raise DataError(f"rollout {rollout_id}: {error}") from error
    for sample, (ids, mask) in zip(samples, encoded, strict=True):
        fill(sample, ids, mask, args.rollout_max_context_len)
    return RolloutFnTrainOutput(groups)


generate_rollout.needs_engines = False  # type: ignore[attr-defined]  # read by the rollout role


def conversation(sample: Sample) -> Messages:
    """The messages of a sample; text and label are a question and its answer."""
    messages = [{"role": "user", "content": sample.prompt}] if isinstance(sample.prompt, str) else sample.prompt
    if messages[-1]["role"] == "assistant":
        return messages
    if not isinstance(sample.label, str):
        raise DataError(
            f"prompt {str(sample.prompt)[:80]!r}: supervised fine-tuning needs messages that end with the assistant's, "
            f"or the answer as text in --label-key (found {type(sample.label).__name__})"
        )
    return [*messages, {"role": "assistant", "content": sample.label}]


def fill(sample: Sample, ids: list[int], mask: list[int], max_context_len: int | None) -> None:
    """Set tokens, response and mask.  The response begins with the first token that trains."""
    sample.status = Status.COMPLETED
    if max_context_len is not None and len(ids) > max_context_len:
        ids, mask = ids[:max_context_len], mask[:max_context_len]
        sample.status = Status.TRUNCATED
    if 1 not in mask:
        limit = " within --rollout-max-context-len" if sample.status is Status.TRUNCATED else ""
        raise DataError(f"prompt {str(sample.prompt)[:80]!r}: no token of an assistant{limit}")
    start = mask.index(1)
    sample.tokens, sample.loss_mask = ids, mask[start:]
    sample.response_length = len(ids) - start
    sample.reward = 0.0


def _only_sample(group: Group) -> Sample:
    if len(group) != 1:
        raise ConfigError(
            f"--n-samples-per-prompt {len(group)}: supervised fine-tuning takes every conversation once; leave it at 1"
        )
    return group[0]


@lru_cache(maxsize=4)
def _loss_masks(checkpoint: str, kind: MaskType) -> LossMasks:
    return LossMasks(load_tokenizer(checkpoint), kind)

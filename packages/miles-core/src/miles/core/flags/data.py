"""Prompts, and how many of them make a rollout, a batch, a step."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PositiveInt

from miles.core.config.group import DERIVED, Flag, Group


class Data(Group):
    title = "Data Arguments"

    num_rollout: PositiveInt | None = None
    """Rollouts of the run. Give this or ``--num-epoch``."""

    num_epoch: PositiveInt | None = None
    """Passes over the prompt data: ``num_rollout`` becomes ``(prompts // rollout_batch_size) * num_epoch``.
    ``--num-rollout`` wins when both are given."""

    rollout_global_dataset: Annotated[bool, Flag(spelling="--disable-rollout-global-dataset", negates=True)] = True
    """Do not read ``--prompt-data``: the rollout function gets empty samples and finds its own prompts."""

    data_source_path: Annotated[str, Flag(plugin="miles.data_sources")] = (
        "miles.rollout.data_source.RolloutDataSourceWithBuffer"
    )
    """Class that serves prompts, by name or dotted path."""

    prompt_data: str | None = None
    """Prompt file, JSONL or Parquet; ``file@[start:end]`` takes some of its rows. An address works too: ``https://...``
    or ``hf://datasets/OWNER/NAME[@REVISION]/FILE``."""

    input_key: str = "input"
    """Column of the prompt: text, or a list of messages."""

    label_key: str | None = None
    """Column of the ground truth."""

    metadata_key: str = "metadata"
    """Column of a mapping that travels with the sample to rewards and hooks."""

    multimodal_keys: dict[str, str] | None = None
    """Columns of media, as a JSON object from ``image``, ``video`` or ``audio`` to a column of addresses, paths or
    bytes. The prompt says ``<image>`` and so on where they belong."""

    tool_key: str = "tools"
    """Column of tool definitions for the chat template."""

    apply_chat_template: bool = False
    """Apply the tokenizer's chat template; the prompt is a list of messages."""

    apply_chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the chat template, as a JSON object."""

    rollout_batch_size: PositiveInt
    """Prompts per rollout."""

    n_samples_per_prompt: PositiveInt = 1
    """Responses per prompt."""

    num_steps_per_rollout: PositiveInt = DERIVED
    """Optimizer steps per rollout. ``rollout_batch_size * n_samples_per_prompt = global_batch_size *
    num_steps_per_rollout``: what is left out is derived; 1 when both are left out."""

    use_dynamic_batch_size: bool = False
    """Pack samples of any length into micro-batches of at most ``--max-tokens-per-gpu`` tokens."""

    max_tokens_per_gpu: PositiveInt | None = None
    """Most tokens of one micro-batch on one rank; only a single longer sample may exceed it."""

    log_probs_max_tokens_per_gpu: PositiveInt | None = None
    """Most tokens of one micro-batch when only log-probabilities are computed (old policy, reference, teacher), which
    takes less memory than training. Left out, these passes use the very micro-batches of training, so that both round
    alike and the first optimizer step of a rollout sees ratios of exactly 1; given, to rounding only."""

    balance_data: bool = False
    """Give every data-parallel rank about as many tokens as the others."""

    data_pad_size_multiplier: PositiveInt = 128
    """Fill the tokens of a micro-batch up to a multiple of this, with tokens that nobody sees: matrix kernels like
    round sizes. 1 on the CPU unless given."""

    micro_batch_size: PositiveInt = 1
    """Samples of one micro-batch. Not used with ``--use-dynamic-batch-size``."""

    global_batch_size: PositiveInt = DERIVED
    """Samples per optimizer step. Derived when left out, see ``--num-steps-per-rollout``."""

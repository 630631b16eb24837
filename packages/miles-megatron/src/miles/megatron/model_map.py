"""A model family: its architecture in Megatron-Core's terms, and its weights under two names.

``miles.model_maps`` entry points name a ``ModelMap`` by the ``model_type`` of a Hugging Face ``config.json``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from miles.core.errors import TrainingError
from miles.megatron.layouts import REPLICATED, Layout

HfConfig = Mapping[str, Any]
"""The text of a ``config.json``."""


LATENT_FIELDS = (
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "mscale",
    "mscale_all_dim",
)
"""What ``MLATransformerConfig`` has about the latent space and its positions."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The constants of a model.  ``transformer`` are fields of Megatron-Core's ``TransformerConfig``."""

    transformer: dict[str, Any]
    vocab_size: int
    max_positions: int
    tied: bool
    """Whether the output head is the embedding."""
    rotary: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``GPTModel`` about rotary positions."""
    yarn: dict[str, Any] | None = None
    """What Megatron-Core reads as ``yarn_...`` attributes of its configuration; None: positions are not stretched so,
    or ``latent_attention``, which has them in its configuration."""
    latent_attention: bool = False
    """Whether the configuration is an ``MLATransformerConfig``."""
    mtp_layers: int = 0
    """Layers of multi-token prediction that the checkpoint may have and ``WeightMap`` knows."""
    sandwich_norms: bool = False
    """Whether the outputs of attention and MLP are normed before they are added to the residual stream."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of parameter.  Names have ``{layer}`` and ``{expert}`` where numbers stand."""

    megatron: str
    hf: tuple[str, ...]
    layout: Layout = REPLICATED
    stacked: int = 0
    """Experts of a layer that are one tensor of the checkpoint, along its first dimension; 0: each has its own."""
    keeps_dtype: bool = False
    """Whether the parameter has a dtype of its own, whatever that of the model."""

    @property
    def pattern(self) -> re.Pattern[str]:
        text = re.escape(self.megatron)
        return re.compile(text.replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)"))


@dataclass(frozen=True, slots=True)
class Place:
    """One parameter of the whole model and where its values are in a checkpoint."""

    hf_names: tuple[str, ...]
    layout: Layout
    stacked: int = 0
    index: int = 0
    """Which of the ``stacked`` parts of the tensors it is."""
    keeps_dtype: bool = False


class WeightMap:
    """All rules of one model."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)

    def place(self, name: str) -> Place:
        """Where the parameter ``name`` (numbered over the whole model) is in a Hugging Face checkpoint."""
        for rule, pattern in self._patterns:
            if match := pattern.fullmatch(name):
                numbers = match.groupdict()
                return Place(
                    hf_names=tuple(hf.format(**numbers) for hf in rule.hf),
                    layout=rule.layout,
                    stacked=rule.stacked,
                    index=int(numbers["expert"]) if rule.stacked else 0,
                    keeps_dtype=rule.keeps_dtype,
                )
        raise TrainingError(
            f"no rule says which tensor of the Hugging Face checkpoint is {name}: "
            "the model map of this family does not cover a model built with these flags"
        )

    @cached_property
    def _patterns(self) -> list[tuple[Rule, re.Pattern[str]]]:
        return [(rule, rule.pattern) for rule in self.rules]


@dataclass(frozen=True, slots=True)
class ModelMap:
    """A family."""

    architecture: Callable[[HfConfig], Architecture]
    """Raises TrainingError for what Megatron-Core cannot express."""
    weights: Callable[[HfConfig, int], WeightMap]
    """From the configuration and the padded size of the vocabulary."""

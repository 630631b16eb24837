"""One rank of PPO's critic on Megatron-Core."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from miles.core.driver.weights_only import has_release
from miles.core.protocols.backend import Rank
from miles.core.training.critic import CriticTrainer
from miles.core.training.value_head import critic_source, write_value_head
from miles.megatron.building import Blueprint
from miles.megatron.policy import MegatronValues, Passes
from miles.megatron.role import MegatronRole
from miles.megatron.site import PipelineRanks
from miles.megatron.value import PREFIX, ValueReader

if TYPE_CHECKING:
    from miles.core.config import Config


class MegatronCritic(MegatronRole):
    """The body of the actor's checkpoint, or of ``--critic-load``, under a value head on the last stage."""

    def __init__(self, config: Config, rank: Rank) -> None:
        super().__init__(config, rank)
        weights = critic_source(self._checkpoint) or self._source
        if not has_release(weights):  # which has no configuration beside it
            self._source = weights
        self._blueprint = Blueprint.of(config, self._site, self._source, "critic")
        self._chunks = self._blueprint.build()
        self._blueprint.load(self._chunks, weights)
        passes = Passes(self._ready(), ValueReader(), self._site.layout)
        self._trainer = CriticTrainer(
            config, MegatronValues(passes, self._updater), ranks=PipelineRanks(), device=self._site.device
        )

    def _exported(
        self, weights: Iterator[tuple[str, torch.Tensor]], directory: Path
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The body; the value head is written beside it."""
        head = {}
        for name, tensor in weights:
            if name.startswith(PREFIX):
                head[name.removeprefix(PREFIX)] = tensor.float()
            else:
                yield name, tensor
        write_value_head(head, directory)

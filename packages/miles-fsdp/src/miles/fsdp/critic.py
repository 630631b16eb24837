"""One rank of PPO's critic on FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from miles.core.protocols.backend import Rank
from miles.core.training.critic import CriticTrainer
from miles.core.training.value_head import critic_source
from miles.fsdp import export
from miles.fsdp.role import FsdpRole
from miles.fsdp.value import Critic, save_value_head

if TYPE_CHECKING:
    from miles.core.config import Config


class FsdpCritic(FsdpRole):
    """The body of the actor's checkpoint, or of ``--critic-load``, under a value head."""

    def __init__(self, config: Config, rank: Rank) -> None:
        super().__init__(config, rank)
        self._source = critic_source(self._checkpoint) or self._source
        module = self._builder.build_critic(str(self._source), seed=config.seed)
        self._model: Critic = Critic(module, self._optimizer(module), self._gradients)
        self._trainer = CriticTrainer(config, self._model, ranks=self._ranks(), device=self._site.device)

    def save_hf(self, directory: Path) -> None:
        """The body as transformers loads it, and the value head beside it."""
        export.save_model(self._model.whole_lm(), self._site, self._source, directory)
        save_value_head(self._model.module, directory, writes=self._site.rank.rank == 0)

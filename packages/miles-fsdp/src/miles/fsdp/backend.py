"""The entry point of ``--train-backend fsdp``.  Imports nothing heavy before a model is wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles.core.protocols.backend import Learner, Rank, Role

if TYPE_CHECKING:
    from miles.core.config import Config


class FsdpBackend:
    """FSDP2 over any causal language model that transformers loads."""

    def create(self, config: Config, rank: Rank, role: Role = "actor") -> Learner:
        # Late: both need torch and transformers.
        from miles.fsdp.actor import FsdpActor
        from miles.fsdp.critic import FsdpCritic

        return FsdpCritic(config, rank) if role == "critic" else FsdpActor(config, rank)

    def check(self, config: Config) -> list[str]:
        return []

    def defaults(self) -> dict[str, Any]:
        return {"lr_decay_style": "constant"}

"""The entry point of ``--train-backend megatron``.  Imports nothing heavy before a model is wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles.core.protocols.backend import Learner, Rank, Role
from miles.megatron.rules import layout_problems

if TYPE_CHECKING:
    from miles.core.config import Config


class MegatronBackend:
    """Megatron-Core: tensor, sequence, pipeline, context, expert and data parallelism."""

    def create(self, config: Config, rank: Rank, role: Role = "actor") -> Learner:
        # Late: the adaptation must come before anything of Megatron-Core, and all of it needs torch.
        from miles.megatron import cpu

        cpu.install()
        from miles.megatron.actor import MegatronActor
        from miles.megatron.critic import MegatronCritic

        return MegatronCritic(config, rank) if role == "critic" else MegatronActor(config, rank)

    def check(self, config: Config) -> list[str]:
        return list(layout_problems(config))

    def defaults(self) -> dict[str, Any]:
        return {"lr_decay_style": "linear"}

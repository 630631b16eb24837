"""The entry point of ``--train-backend megatron``: it says that there is nothing behind it yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles.core.errors import ConfigError
from miles.core.protocols.backend import Actor, Rank, Role

if TYPE_CHECKING:
    from miles.core.config import Config


class MegatronBackend:
    """Refuses every run.  Nothing is trained by another backend than the one that was asked for."""

    def create(self, config: Config, rank: Rank, role: Role = "actor") -> Actor:
        raise ConfigError(*self.check(config))

    def check(self, config: Config) -> list[str]:
        chosen = "" if config.origin["train_backend"] in ("flag", "file") else ", which is the default,"
        return [f"--train-backend megatron{chosen} does not exist yet. Type --train-backend fsdp"]

    def defaults(self) -> dict[str, Any]:
        return {"lr_decay_style": "linear"}

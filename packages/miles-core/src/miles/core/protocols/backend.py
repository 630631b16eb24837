"""Training backend: what a rank of the actor (or critic) can do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from miles.core.types.batch import Floats, RolloutBatch

if TYPE_CHECKING:
    import torch

    from miles.core.config import Config
    from miles.core.weights.adapter_form import AdapterForm

Role = Literal["actor", "critic"]
Scores = dict[str, tuple[Floats, ...]]
"""Columns of a ``RolloutBatch`` by their names; [R] per sample."""


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of a training group.

    ``master`` is ``host:port`` of the rendezvous; a group of one rank needs none.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master: str | None = None


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What one call of ``train`` did.  The same on every rank."""

    metrics: dict[str, float]
    """Averages over the rollout, named as they are logged (``train/loss``, ``rollout/log_probs`` ...)."""
    steps: tuple[dict[str, float], ...] = ()
    """Metrics of each optimizer step, in order."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds per phase (``log_probs``, ``ref_log_probs``, ``actor_train`` ...)."""


class Learner(Protocol):
    """One rank of a model being trained: of the actor, or of PPO's critic.

    Every rank calls a method at the same time, unless its text says local.
    """

    def score(self, batch: RolloutBatch) -> Scores:
        """What the other role needs of this one before both train: the critic's ``values``; the actor's ``log_probs``
        and ``ref_log_probs`` where the reward penalizes the KL divergence.  Called only when there is a critic.
        """

    def train(self, batch: RolloutBatch) -> TrainReport:
        """Train on one rollout.  ``batch`` is the whole rollout on every rank; a rank picks its own share."""

    def save(self, directory: Path) -> None:
        """Write everything that training needs to go on bit for bit into the existing, empty ``directory``."""

    def finish_save(self) -> None:
        """Return when what ``save`` began is on disk; raise what went wrong.

        With ``--async-save`` the files may still be written when ``save`` returns; without it there is nothing to do.
        Local, and called from another thread than the other methods, which may run meanwhile.
        """

    def load(self, directory: Path) -> None:
        """Restore what ``save`` wrote, on the same or another number of ranks."""

    def save_hf(self, directory: Path) -> None:
        """Export a directory that transformers loads: weights, config and tokenizer."""

    def offload(self) -> int:
        """Move to host memory; the bytes of the accelerator that this frees.

        Where there is none: a no-op, or the same between two places of host memory with the bytes it would have freed.
        """

    def onload(self) -> None:
        """Undo ``offload``."""

    def close(self) -> None:
        """Leave the process group and free everything.  Local."""


class Actor(Learner, Protocol):
    """One rank of the policy, which engines generate with."""

    def log_probs(self, batch: RolloutBatch) -> tuple[Floats, ...]:
        """[R] natural-log probabilities of every sample's response, with the weights as they are."""

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full tensors under their Hugging Face names, one after another, in a fixed order.

        Rank 0 gets the tensors; other ranks take part in the gathering and may get placeholders.
        """

    def keep_weights(self, version: int) -> None:
        """Remember the weights as they are, which engines get as ``version`` now, for the old log-probabilities of what
        they generate.  With ``--keep-old-actor`` only."""


class AdapterActor(Actor, Protocol):
    """One rank of a policy whose adapters alone are trained (``--lora-rank``)."""

    def adapter_form(self) -> AdapterForm:
        """Of all adapters of the model, the same on every rank.  Local."""

    def named_adapters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Like ``named_weights``, the tensors of the adapters: those that ``adapter_form().names()`` names."""


class TrainBackend(Protocol):
    """A way to train: ``miles.train_backends`` entry points name a class without arguments."""

    def create(self, config: Config, rank: Rank, role: Role = "actor") -> Learner:
        """Join the process group, build model, optimizer and schedule from the configuration's checkpoint flags.

        An ``Actor``, where that is the role.
        """

    def check(self, config: Config) -> list[str]:
        """Problems that would stop this backend, found before any device is taken.  Imports nothing heavy."""

    def defaults(self) -> dict[str, Any]:
        """Values of flags that this backend sets when nobody typed them."""

"""Who gives memory up while the other half of a run works (``--offload-train``, ``--offload-rollout``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from miles.core.flags.cluster import Cluster
from miles.core.flags.training import Training

if TYPE_CHECKING:
    from miles.core.config.config import Config
    from miles.core.config.draft import Draft

HALVES = ("offload_train", "offload_rollout")


def derive_offloading(draft: Draft) -> None:
    """On accelerators that both share neither half has room for what the other one holds."""
    whole = not (draft["debug_rollout_only"] or draft["debug_train_only"])
    if draft["offload"]:
        why = "--offload"
    elif draft["colocate"] and draft["device"] == "cuda" and whole:
        why = "--colocate: trainer and engines take turns on the same accelerators"
    else:
        return
    for half in HALVES:
        draft.derive(half, True, why)


def check_offloading(config: Config) -> Iterator[str]:
    """Halves that work at the same time cannot take turns."""
    cluster = config[Cluster]
    given = [f"--{half.replace('_', '-')}" for half in HALVES if getattr(cluster, half)]
    if given and config[Training].async_training:
        yield (
            f"{' and '.join(given)}: trainer and engines take turns, but asynchronous training runs both at once. Use "
            "`miles train`, or leave it out"
        )

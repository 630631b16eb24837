"""``/release_memory_occupation`` and ``/resume_memory_occupation``: memory that somebody else uses for a while."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from miles.rollout.engines.embedded.model import Model
from miles.rollout.engines.embedded.protocol import BadRequest
from miles.rollout.engines.embedded.runner import Runner
from miles.rollout.engines.embedded.scheduler import Scheduler
from miles.rollout.engines.embedded.weights import WeightError

KV_CACHE, WEIGHTS = "kv_cache", "weights"
TAGS = frozenset({KV_CACHE, WEIGHTS, "cuda_graph"})
"""SGLang's.  There are no CUDA graphs here, so that tag frees nothing."""
UNSENT = "released"
"""Version of weights that were released: no trainer has one of this name, so none sends changes of it."""


class MemoryOccupation:
    """Frees and takes memory on the model thread."""

    def __init__(self, runner: Runner, model: Model) -> None:
        self._runner, self._model = runner, model

    def release(self, body: dict[str, Any]) -> Future[int]:
        """Free the memory of ``tags`` (default: all); the bytes that were freed.  Nothing may be running."""
        tags = _tags(body)

        def release(scheduler: Scheduler) -> int:
            if scheduler.running() or scheduler.waiting:
                raise WeightError("requests are running or waiting; end them first (/abort_request, /pause_generation)")
            new, scheduler.released = tags - scheduler.released, scheduler.released | tags
            freed = self._release_cache(scheduler) if KV_CACHE in new else 0
            return freed + (self._release_weights(scheduler) if WEIGHTS in new else 0)

        return self._runner.call(release)

    def resume(self, body: dict[str, Any]) -> Future[None]:
        """Take the memory of ``tags`` (default: all) again.  Weights are then whatever is sent."""
        tags = _tags(body)

        def resume(scheduler: Scheduler) -> None:
            if WEIGHTS in tags & scheduler.released:
                self._model.weights.restore()
            scheduler.released -= tags

        return self._runner.call(resume)

    def problem(self, scheduler: Scheduler) -> str | None:
        """Why nothing can be generated now; None when memory and weights are there."""
        if scheduler.released:
            tags = ", ".join(sorted(scheduler.released))
            return f"the memory of {tags} is released; call /resume_memory_occupation first"
        if unsent := self._model.weights.unsent.copy():  # the model's thread takes from it while weights come in
            return (
                f"the weights were released, and {len(unsent)} of their tensors were not sent again ({min(unsent)} is "
                "one of them): update the weights first"
            )
        return None

    def _release_cache(self, scheduler: Scheduler) -> int:
        freed = scheduler.kv.allocated_tokens * self._model.kv_shape.token_bytes
        scheduler.weights_changed()
        scheduler.kv.trim()
        return freed

    def _release_weights(self, scheduler: Scheduler) -> int:
        scheduler.weights_changed()
        scheduler.set_version(UNSENT)
        return self._model.free_copies() + self._model.weights.release()


def _tags(body: dict[str, Any]) -> frozenset[str]:
    given = body.get("tags")
    if given is None:
        return TAGS
    if not isinstance(given, list) or not set(given) <= TAGS:
        raise BadRequest(f"tags is {given!r}; it must be a list of some of {', '.join(sorted(TAGS))}")
    return frozenset(given)

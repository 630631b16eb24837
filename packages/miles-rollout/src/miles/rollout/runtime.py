"""Everything a rollout function works with: ``args.runtime``."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from miles.core.errors import EngineError
from miles.core.protocols.reward import RewardDispatcher
from miles.rollout.data import PromptDataset
from miles.rollout.eval_datasets import EvalDataset
from miles.rollout.generate_state import GenerateState, RolloutArgs
from miles.rollout.generators.registry import Generators
from miles.rollout.group_task import GroupWorker
from miles.rollout.hooks import Hooks
from miles.rollout.http import JsonClient
from miles.rollout.loop_thread import LoopThread
from miles.rollout.progress import Progress
from miles.rollout.sampling import SamplingSettings
from miles.rollout.slots import Slots
from miles.rollout.stream import Stream
from miles.rollout.teacher import Teacher

if TYPE_CHECKING:
    from miles.rollout.buffer_rollout import Feed

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_ABORT_DEADLINE_S = 10.0
_WATCH_INTERVAL_S = 1.0


@dataclass(slots=True)
class Runtime:
    """Owned by the rollout role.  Its coroutines run on ``loop``."""

    args: RolloutArgs
    loop: LoopThread
    state: GenerateState
    generators: Generators
    hooks: Hooks
    rewards: RewardDispatcher | None
    settings: SamplingSettings
    """How training responses are sampled."""
    max_in_flight: int
    """Samples in generation at the same time."""
    teacher: Teacher | None = None
    whole_groups: bool = True
    """A group may go to one engine in one request."""
    engine_urls: Callable[[], Sequence[str]] = lambda: ()
    """Addresses of the engines that live now."""
    eval_data: Sequence[tuple[EvalDataset, PromptDataset]] = ()
    check_alive: Callable[[], None] = lambda: None
    """Raises EngineError when a server has died."""

    progress: Progress = field(default_factory=Progress)
    """Of the rollout or evaluation that runs."""
    weight_version: int = 0
    """That the engines have."""
    feed: Feed | None = None
    """Of rollouts that a buffer service makes, once it was told to."""
    stream: Stream | None = None
    """Of a rollout function that generates all the time, once it has begun."""

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run ``work`` on the loop, from another thread.  A dead server ends it at once, not after the last retry."""
        return self.loop.run(self._watched(work))

    async def _watched(self, work: Coroutine[Any, Any, Result]) -> Result:
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=_WATCH_INTERVAL_S))[0]:
                self.check_alive()
            return task.result()
        finally:
            task.cancel()

    def worker(self, *, evaluation: bool = False) -> GroupWorker:
        """A worker for one rollout or one evaluation."""
        return GroupWorker(
            # The end of a rollout aborts its own samples; an evaluation beside it goes on.
            state=copy.copy(self.state) if evaluation else self.state,
            generators=self.generators,
            rewards=self.rewards,
            slots=Slots(self.max_in_flight),
            whole_groups=self.whole_groups,
            group_rm=self.args.group_rm,
            mask_offpolicy=self.args.mask_offpolicy_in_partial_rollout and not evaluation,
            teacher=self.teacher,
            retries=self.args.rollout_sample_retries,
            progress=self.progress,
        )

    async def abort(self) -> None:
        """Make all generation end soon: nothing new starts, engines cut what runs."""
        self.state.aborted = True
        await asyncio.gather(*(self._abort_engine(url) for url in self.engine_urls()))

    def resume(self) -> None:
        """Allow generation again."""
        self.state.aborted = False

    async def _abort_engine(self, url: str) -> None:
        client = JsonClient(url, deadline_s=_ABORT_DEADLINE_S)
        try:
            await client.post("/abort_request", {"abort_all": True})
        except EngineError as error:
            logger.warning("an engine did not take the abort of surplus requests: %s", error)
        finally:
            await client.close()

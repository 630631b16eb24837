"""The trainer's weights on their way to the engines: to all at an update, and to one that takes a lost one's place."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from miles.core.driver.executor import ActorGroup
from miles.core.driver.turns import MemoryTurns
from miles.core.errors import EngineError, MilesError
from miles.core.flags.cluster import Cluster
from miles.core.flags.training import Training
from miles.core.protocols.rollout import RolloutRole
from miles.core.weights.sync import SyncReport

if TYPE_CHECKING:
    from miles.core.config import Config

logger = logging.getLogger(__name__)

DEATH_NOTICE_S = 2.0
"""A process that is killed closes its connections a moment before its owner can know."""
_LOOK_INTERVAL_S = 0.5
_END_DEADLINE_S = 10.0


def repeats_weights(config: Config) -> bool:
    """Whether an engine can be replaced while the trainer's own weights are not to be had.

    It has left those behind that others work with, or its memory is the engines' (``--offload-train``).
    """
    beside = config[Training].async_training or config.eval_async
    return bool(config.use_fault_tolerance and (beside or config[Cluster].offload_train))


class WeightSupply:
    """Owned by the job.  ``turns`` says whose turn it is where trainer and engines share memory.

    ``replaces``: the rollout side replaces lost engines; ``notice_s`` is how long it may take to see that one hangs.
    ``repeats``: a new engine gets the weights that engines took last, not the trainer's, if all of them arrived.

    New engines are served from a thread of its own, whenever the trainer is free: a rollout whose only engine is lost
    waits for that.
    """

    def __init__(
        self,
        rollout: RolloutRole,
        actors: ActorGroup,
        turns: MemoryTurns | None = None,
        *,
        replaces: bool = False,
        repeats: bool = False,
        notice_s: float = 0.0,
    ) -> None:
        self._rollout, self._actors = rollout, actors
        self._turns = turns or MemoryTurns(rollout, actors)
        self._replaces, self._repeats = replaces, repeats
        self._notice_s = DEATH_NOTICE_S + (notice_s if replaces else 0.0)
        self._version: int | None = None
        """Of the trainer."""
        self._sent: int | None = None
        """Of the engines, and of what is repeated; None: no engine has taken all of it."""
        self._busy = threading.Lock()
        self._ending = threading.Event()
        self._server: threading.Thread | None = None

    def start(self) -> None:
        """Begin to serve engines that take the places of others."""
        if self._replaces:
            self._server = threading.Thread(target=self._serve, name="weight-supply", daemon=True)
            self._server.start()

    def stop(self) -> None:
        """Serve no more.  Safe to call twice."""
        self._ending.set()
        if self._server is not None:
            self._server.join(_END_DEADLINE_S)

    @contextmanager
    def trainer(self, *, becomes: int | None = None) -> Iterator[None]:
        """Have the trainer for the block.  ``becomes``: the version of its weights afterwards."""
        with self._busy:
            self._turns.for_training()
            yield
            self._version = self._version if becomes is None else becomes

    def update(self, version: int) -> SyncReport | None:
        """Bring every engine to the trainer's weights, which are ``version``; None where there is no engine.

        An engine that is lost meanwhile is left out when it is being replaced; otherwise EngineError says who it was.
        When all of them are, and the trainer would go on to other weights meanwhile, the first new one is awaited.
        """
        with self._busy:
            self._version = version
            while urls := self._rollout.engine_urls() or self._successors():
                try:
                    return self._push(urls, version, self._send)
                except EngineError:
                    if not self._lost_one_of(urls):
                        raise
            return None

    def _successors(self) -> Sequence[str]:
        """Addresses of new engines where all are lost; none where the trainer can serve them when they come."""
        self._turns.for_generating()  # those that are to come need the memory that the lost ones had given up
        urls: Sequence[str] = ()
        while self._repeats and not urls:
            time.sleep(_LOOK_INTERVAL_S)
            self._rollout.check_alive()  # EngineError when no more are started
            urls = self._rollout.engine_urls()
        return urls

    def _push(self, urls: Sequence[str], version: int, send: Callable[[list[str], int], SyncReport]) -> SyncReport:
        updated: Sequence[str] = ()
        self._rollout.weights_updating()
        try:
            report = send(list(urls), version)
            updated = urls
        finally:
            self._rollout.weights_updated(version, updated)
        return report

    def _send(self, urls: list[str], version: int) -> SyncReport:
        """The trainer's weights, proved."""
        self._sent = None
        self._turns.for_sending()
        report = self._actors.update_weights(urls, version)
        self._sent = version
        self._turns.for_generating()
        with report.phase("probe"):
            report.probe_difference = self._actors.probe_engines()
        return report

    def _lost_one_of(self, urls: Sequence[str]) -> bool:
        """Whether one of ``urls`` turns out to be lost and its replacement under way.

        EngineError that names it when it is not replaced: that says more than that it does not answer.
        """
        deadline = time.monotonic() + self._notice_s
        while True:
            last_look = time.monotonic() >= deadline
            self._rollout.check_alive()
            if self._replaces and set(urls) - set(self._rollout.engine_urls()):
                return True
            if last_look:
                return False
            time.sleep(DEATH_NOTICE_S / 20)

    def _serve(self) -> None:
        while not self._ending.wait(_LOOK_INTERVAL_S):
            try:
                if self._rollout.engines_waiting():
                    self._serve_waiting()
            except Exception:  # the job's own next call of the same role tells it to the user
                logger.warning("engines that wait for weights could not be looked after", exc_info=True)

    def _serve_waiting(self) -> None:
        with self._busy:
            if self._turns.engines_rest:  # the update that ends this reaches them too
                return
            version = self._version
            for url in self._rollout.engines_waiting() if version is not None else ():
                assert version is not None
                try:
                    self._serve_one(url, version)
                except MilesError as error:
                    self._rollout.replace_engine(url, f"the engine at {url} did not take weights: {error}")

    def _serve_one(self, url: str, version: int) -> None:
        if self._repeats and self._sent is not None:
            self._push([url], self._sent, self._actors.repeat_weights)
        else:
            self._push([url], version, self._send)

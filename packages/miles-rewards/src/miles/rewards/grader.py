"""A reward type that grades text: a plain function of (response, label, metadata)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from miles.rewards.context import Context, shared_context
from miles.rewards.pool import Job
from miles.rewards.scorer import GraderScorer
from miles.rewards.verdict import Verdict

if TYPE_CHECKING:
    from miles.core.protocols.reward import Score
    from miles.core.types.sample import Sample

Grade = Callable[[str, Any, Mapping[str, Any]], Verdict | float | dict[str, Any]]


@dataclass(frozen=True)
class Grader:
    """A reward type.  ``miles.rewards`` entry points name instances; awaiting a call grades one sample."""

    name: str
    grade: Grade
    """Grades in a worker process.  A module-level function; may be slow, hang or crash."""
    quick: Callable[[str, Any, Mapping[str, Any]], Verdict | None] | None = None
    """Grades the easy cases at once, on the event loop: its time must be bounded (well below a millisecond).  None: ask
    ``grade``."""
    reads: tuple[str, ...] | None = ()
    """Entries of a sample's metadata that matter; None: all."""
    preload: tuple[str, ...] = ()
    """Modules that ``grade`` imports when it is called."""
    extra: str | None = None
    """Extra of this package that installs what ``preload`` names."""
    timeout_s: float = 2.0
    failure_score: Score = 0.0
    """Reward of a response that could not be graded: that of a wrong answer."""
    keys: tuple[str, ...] = ()
    """Entries of the reward, if it is a mapping."""
    finds_answer: bool = False
    """Whether it looks for the last box or final answer itself, so that ``boxed_`` before its name changes nothing."""

    @cached_property
    def job(self) -> Job:
        """``grade``, as workers find it."""
        return Job(f"{self.grade.__module__}:{self.grade.__qualname__}", timeout_s=self.timeout_s)

    @cached_property
    def boxed_job(self) -> Job:
        """``grade`` on the content of the last box, as workers find it."""
        return Job("miles.rewards.math.boxed:grade_content", bound=(self.grade,), timeout_s=self.timeout_s)

    @property
    def missing(self) -> str:
        """What must be installed before it can grade, and how; empty when nothing must."""
        if self.extra is None or all(map(find_spec, self.preload)):
            return ""
        return f"reward type {self.name} needs what is not installed: pip install 'miles-rewards[{self.extra}]'"

    def scorer(self, context: Context, *, boxed: bool = False) -> GraderScorer:
        """What grades samples with it, in the context's workers."""
        return GraderScorer(self, context, boxed=boxed and not self.finds_answer)

    async def __call__(self, args: Any, sample: Sample, **kwargs: Any) -> Score:
        """Grade one sample in the workers of this process; a failure gives ``failure_score``."""
        return (await self.scorer(shared_context()).score(sample)).score

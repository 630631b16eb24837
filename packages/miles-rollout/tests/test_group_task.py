from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from rollout_fakes import FakeRewards, make_group

from miles.core.errors import EngineError
from miles.core.types.rollout import GenerateFnInput, GenerateFnOutput
from miles.core.types.sample import Group, Sample, Status
from miles.rollout.generators.adapt import Generator
from miles.rollout.group_task import GroupWorker, failure
from miles.rollout.progress import Progress
from miles.rollout.slots import Slots

PARAMS = {"temperature": 1.0}


def finish(sample: Sample) -> list[Sample]:
    sample.tokens, sample.response_length, sample.status = [1, 2, 3], 2, Status.COMPLETED
    return [sample]


def worker(
    generate: Callable[[GenerateFnInput], Any] | None = None,
    together: Any = None,
    resumes: bool = True,
    **changes: Any,
) -> GroupWorker:
    async def call(input: GenerateFnInput) -> GenerateFnOutput:
        found = finish(input.sample) if generate is None else generate(input)
        return GenerateFnOutput(await found if asyncio.iscoroutine(found) else found)

    class One:
        def of(self, sample: Sample) -> Generator:
            return Generator(call, resumes=resumes)

        def together(self, group: Group) -> Any:
            return together

    state: Any = SimpleNamespace(aborted=False, args=SimpleNamespace(rollout_seed=1))
    values = {"rewards": FakeRewards(), "slots": Slots(8), **changes}
    return GroupWorker(state=state, generators=One(), **values)  # type: ignore[arg-type]


async def test_samples_are_generated_and_scored() -> None:
    group = await worker().run(make_group(0), PARAMS)
    assert [sample.reward for sample in group] == [2.0, 2.0]


async def test_progress_counts_samples_of_all_groups() -> None:
    progress = Progress()
    assert progress.text() is None
    told: list[str | None] = []

    def tell(input: GenerateFnInput) -> list[Sample]:
        told.append(progress.text())
        return finish(input.sample)

    at_work = worker(tell, progress=progress)
    await at_work.run(make_group(0), PARAMS)
    await at_work.run(make_group(1), PARAMS)
    assert (told[0], told[2], progress.text()) == ("0/2 samples", "2/4 samples", "4/4 samples")


async def test_seeds_depend_on_the_sample_and_the_stream() -> None:
    seen: list[Any] = []

    def record(input: GenerateFnInput) -> list[Sample]:
        seen.append((input.sampling_params["sampling_seed"], input.evaluation))
        return finish(input.sample)

    at_work = worker(record)
    await at_work.run(make_group(0), PARAMS)
    await at_work.run(make_group(0), PARAMS)
    await at_work.run(make_group(0), PARAMS, "eval")
    assert seen[:2] == seen[2:4]
    assert len({seed for seed, _ in seen}) == 4
    assert [evaluation for _, evaluation in seen] == [False] * 4 + [True] * 2


async def test_a_sample_that_fails_is_generated_afresh_once() -> None:
    calls: list[int | None] = []

    def flaky(input: GenerateFnInput) -> list[Sample]:
        calls.append(input.sample.index)
        if calls.count(1) == 1 and input.sample.index == 1:
            input.sample.tokens = [9, 9]
            raise EngineError("lost")
        assert input.sample.tokens == []
        return finish(input.sample)

    group = await worker(flaky).run(make_group(0), PARAMS)
    assert calls.count(1) == 2
    assert failure(group) is None
    assert [sample.reward for sample in group] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(EngineError("no answer"), "no answer"), (KeyError("x"), "KeyError: 'x'")],
)
async def test_a_sample_that_keeps_failing_is_not_scored_and_says_why(error: Exception, reason: str) -> None:
    def fail(input: GenerateFnInput) -> list[Sample]:
        if input.sample.index == 1:
            raise error
        return finish(input.sample)

    at_work = worker(fail)
    group = await at_work.run(make_group(0), PARAMS)
    assert [sample.status for sample in group] == [Status.COMPLETED, Status.FAILED]
    assert failure(group) == reason
    assert at_work.rewards.scored == [0]  # type: ignore[union-attr]


async def test_aborted_samples_are_neither_generated_nor_scored() -> None:
    at_work = worker()
    at_work.state.aborted = True
    group = await at_work.run(make_group(0), PARAMS)
    assert [sample.status for sample in group] == [Status.ABORTED] * 2
    assert [sample.reward for sample in group] == [None, None]


async def test_a_complete_sample_is_taken_as_it_is() -> None:
    def never(input: GenerateFnInput) -> list[Sample]:
        raise AssertionError("nothing to generate")

    group = make_group(0)
    for sample in group:
        finish(sample)
        sample.reward = 0.5
    assert [sample.reward for sample in await worker(never).run(group, PARAMS)] == [0.5, 0.5]


async def test_a_continued_sample_can_be_masked_where_the_old_policy_wrote() -> None:
    finished = make_group(1, size=1)
    finish(finished[0])
    await worker(mask_offpolicy=True).run(finished, PARAMS)
    assert finished[0].loss_mask == [0, 0], "all of it is the old policy's"
    group = make_group(0)
    group[0].tokens, group[0].response_length, group[0].status = [1, 2, 3], 2, Status.ABORTED
    masks: list[Any] = []

    def record(input: GenerateFnInput) -> list[Sample]:
        masks.append(input.sample.loss_mask)
        input.sample.status = Status.TRUNCATED
        return [input.sample]

    await worker(record, mask_offpolicy=True).run(group, PARAMS)
    assert masks == [[0, 0], None]


@pytest.mark.parametrize(("stream", "rewards"), [("rollout", [None, None, None]), ("eval", [0.0, None, 1.0])])
async def test_what_is_left_of_a_group_is_judged_in_an_evaluation_only(stream: Any, rewards: list[Any]) -> None:
    def fail_once(input: GenerateFnInput) -> list[Sample]:
        finish(input.sample)
        if input.sample.index == 1:
            raise EngineError("lost")
        input.sample.tokens = [input.sample.index or 0, 2, 3]
        return [input.sample]

    judged = worker(fail_once, group_rm=True, rewards=FakeRewards(group_rm=True))
    group = await judged.run(make_group(0, 3), PARAMS, stream)
    assert [sample.reward for sample in group] == rewards


async def test_group_rewards_see_the_whole_group() -> None:
    def by_index(input: GenerateFnInput) -> list[Sample]:
        finish(input.sample)
        input.sample.tokens = [input.sample.index or 0, 2, 3]
        return [input.sample]

    group = await worker(by_index, group_rm=True, rewards=FakeRewards(group_rm=True)).run(make_group(0), PARAMS)
    assert [sample.reward for sample in group] == [0.0, 1.0]


async def test_an_agents_own_reward_is_kept() -> None:
    def rewarded(input: GenerateFnInput) -> list[Sample]:
        input.sample.reward = -3.0
        return finish(input.sample)

    assert [sample.reward for sample in await worker(rewarded).run(make_group(0), PARAMS)] == [-3.0, -3.0]


async def test_several_samples_of_one_execution_share_its_identity() -> None:
    def two(input: GenerateFnInput) -> list[Sample]:
        return finish(Sample(prompt="a")) + finish(Sample(prompt="b"))

    group = await worker(two).run(make_group(3), PARAMS)
    assert [(sample.group_index, sample.index, sample.rollout_id) for sample in group] == [
        (3, 6, 6),
        (3, 6, 6),
        (3, 7, 7),
        (3, 7, 7),
    ]
    assert all(sample.reward == 2.0 for sample in group)


async def test_a_sample_whose_lengths_disagree_fails() -> None:
    def broken(input: GenerateFnInput) -> list[Sample]:
        finish(input.sample)
        input.sample.loss_mask = [1]
        return [input.sample]

    group = await worker(broken).run(make_group(0, 1), PARAMS)
    assert "loss_mask has 1 entries" in (failure(group) or "")


async def test_no_more_samples_run_than_there_are_slots() -> None:
    running = most = 0

    async def slow(input: GenerateFnInput) -> list[Sample]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return finish(input.sample)

    await worker(slow, slots=Slots(3)).run(make_group(0, 10), PARAMS)
    assert most == 3


async def finish_all(inputs: list[GenerateFnInput]) -> list[GenerateFnOutput]:
    assert all(input.sample.status is Status.PENDING for input in inputs)
    return [GenerateFnOutput(finish(input.sample)[0]) for input in inputs]


def never(input: GenerateFnInput) -> list[Sample]:
    raise AssertionError("the group is generated at once")


async def test_a_group_that_is_generated_at_once_is_scored_at_once() -> None:
    scored: list[list[int | None]] = []

    class Rewards(FakeRewards):
        async def score_group(self, samples: Sequence[Sample], *, evaluation: bool = False) -> Any:
            scored.append([sample.index for sample in samples])
            return await super().score_group(samples, evaluation=evaluation)

    progress = Progress()
    group = await worker(never, together=finish_all, rewards=Rewards(), progress=progress).run(make_group(0, 3), PARAMS)
    assert scored == [[sample.index for sample in group]]
    assert [sample.reward for sample in group] == [2.0, 2.0, 2.0]
    assert progress.finished == 3


async def test_a_group_is_generated_at_once_where_that_is_possible() -> None:
    group = make_group(0, 3)
    finish(group[1])
    group[1].reward = 9.0
    finished = await worker(never, together=finish_all).run(group, PARAMS)
    assert [sample.reward for sample in finished] == [2.0, 9.0, 2.0]
    assert finished == group


async def test_whole_groups_can_be_forbidden() -> None:
    async def refuse(inputs: list[GenerateFnInput]) -> list[GenerateFnOutput]:
        raise AssertionError("samples go one by one")

    await worker(together=refuse, whole_groups=False).run(make_group(0), PARAMS)


async def test_when_the_groups_request_fails_samples_are_tried_one_by_one() -> None:
    async def lost(inputs: list[GenerateFnInput]) -> list[GenerateFnOutput]:
        raise EngineError("lost")

    group = await worker(together=lost).run(make_group(0), PARAMS)
    assert [sample.reward for sample in group] == [2.0, 2.0]
    assert all("error" not in sample.metadata for sample in group)


async def test_an_abort_reaches_groups_that_wait() -> None:
    at_work = worker(never, together=finish_all)
    at_work.state.aborted = True
    group = await at_work.run(make_group(0), PARAMS)
    assert [sample.status for sample in group] == [Status.ABORTED] * 2


class FakeTeacher:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def score(self, sample: Sample) -> None:
        if self.error is not None:
            raise self.error
        sample.teacher_log_probs = [-1.0] * sample.response_length


async def test_a_teacher_scores_what_trains() -> None:
    at_work = worker(teacher=FakeTeacher())
    assert [sample.teacher_log_probs for sample in await at_work.run(make_group(0), PARAMS)] == [[-1.0, -1.0]] * 2
    assert [sample.teacher_log_probs for sample in await at_work.run(make_group(0), PARAMS, "eval")] == [None] * 2


async def test_a_teacher_does_not_score_on_for_an_execution_that_broke() -> None:
    ended = asyncio.Event()

    class SlowTeacher:
        async def score(self, sample: Sample) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

    class BrokenRewards(FakeRewards):
        async def score(self, sample: Sample, *, evaluation: bool = False) -> Any:
            await asyncio.sleep(0)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        await worker(teacher=SlowTeacher(), rewards=BrokenRewards()).run(make_group(0), PARAMS)
    await asyncio.wait_for(ended.wait(), 60)


async def test_a_sample_that_the_teacher_cannot_score_has_failed() -> None:
    group = await worker(teacher=FakeTeacher(EngineError("no answer"))).run(make_group(0), PARAMS)
    assert failure(group) == "no answer"


def cut_once(calls: list[int], tokens_at_a_time: int = 1) -> Callable[[GenerateFnInput], list[Sample]]:
    """Every sample's first generation is cut by the engine; the second one ends it."""

    def generate(input: GenerateFnInput) -> list[Sample]:
        sample = input.sample
        calls.append(sample.response_length)
        new = [5] * tokens_at_a_time
        sample.tokens = (sample.tokens or [1]) + new
        sample.response_length += len(new)
        sample.status = Status.ABORTED if calls.count(0) > len(calls) - 1 else Status.COMPLETED
        return [sample]

    return generate


async def test_a_response_that_an_engine_cut_unasked_is_gone_on_with() -> None:
    calls: list[int] = []
    progress = Progress()
    (sample,) = await worker(cut_once(calls), progress=progress).run(make_group(0, size=1), PARAMS)
    assert calls == [0, 1]
    assert (sample.status, sample.tokens, sample.reward) == (Status.COMPLETED, [1, 5, 5], 2.0)
    assert (progress.resumed, progress.retried) == (1, 0)


async def test_a_generate_function_that_cannot_go_on_starts_again() -> None:
    calls: list[int] = []
    progress = Progress()

    def generate(input: GenerateFnInput) -> list[Sample]:
        calls.append(input.sample.response_length)
        finish(input.sample)
        if len(calls) == 1:
            input.sample.status = Status.ABORTED
        return [input.sample]

    (sample,) = await worker(generate, resumes=False, progress=progress).run(make_group(0, size=1), PARAMS)
    assert calls == [0, 0]
    assert sample.status is Status.COMPLETED
    assert (progress.resumed, progress.retried) == (0, 1)


async def test_an_engine_that_only_cuts_fails_the_sample_in_the_end() -> None:
    def generate(input: GenerateFnInput) -> list[Sample]:
        input.sample.status = Status.ABORTED
        return [input.sample]

    group = await worker(generate, retries=0).run(make_group(0, size=1), PARAMS)
    assert failure(group) == "the engine cut the response 8 times in a row"


async def test_retries_are_bounded_and_counted() -> None:
    progress = Progress()

    def fail(input: GenerateFnInput) -> list[Sample]:
        raise EngineError("lost")

    group = await worker(fail, retries=3, progress=progress).run(make_group(0, size=1), PARAMS)
    assert (failure(group), progress.retried) == ("lost", 3)
    again = await worker(fail, retries=0).run(make_group(1, size=1), PARAMS)
    assert failure(again) == "lost"

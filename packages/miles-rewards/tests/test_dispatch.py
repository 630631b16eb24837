import asyncio
import time

import pytest

from miles.core.config import Config
from miles.core.errors import ConfigError, RewardError
from miles.core.registry import Registry
from miles.core.types import Sample
from miles.rewards.dispatch import Dispatcher
from miles.rewards.math.boxed import last_boxed


def dispatcher(**flags) -> Dispatcher:
    return Dispatcher(Config.of(**flags))


def sample(response=r"\boxed{42}", label="42", index=0, **metadata) -> Sample:
    return Sample(index=index, response=response, label=label, metadata=metadata, response_length=3)


async def score(*samples, evaluation=False, **flags):
    rewards = dispatcher(**flags)
    try:
        return [await rewards.score(one, evaluation=evaluation) for one in samples]
    finally:
        await rewards.close()


def test_the_registry_finds_the_dispatcher():
    assert Registry("miles.reward_dispatchers").get("default") is Dispatcher


@pytest.mark.parametrize("name", Registry("miles.rewards").names())
def test_every_type_can_be_built(name):
    flags = {"reward_key": "score"} if name == "dapo" else {}
    dispatcher(rm_type=name, rm_url="http://localhost:1", rollout_max_response_len=8192, **flags)


async def test_a_type_for_all_and_a_type_for_one():
    first, second = await score(sample(), sample("the cat", "cat", rm_type="f1"), rm_type="math")
    assert (first.score, first.category) == (1.0, "correct")
    assert (second.score, second.category) == (1.0, "scored")


async def test_boxed_grades_the_content_of_the_last_box():
    assert [outcome.score for outcome in await score(sample(r"no \boxed{the cat}", "cat"), rm_type="boxed_f1")] == [1.0]


async def test_boxed_changes_nothing_for_types_that_find_the_answer_themselves():
    assert [outcome.score for outcome in await score(sample(), rm_type="boxed_math")] == [1.0]


async def test_an_outcome_is_written_into_its_sample():
    graded = sample(label=None)
    (outcome,) = await score(graded, rm_type="math", rm_failure_action="mask")
    outcome.apply(graded)
    assert (graded.reward, graded.metadata["reward_category"], graded.remove_sample) == (0.0, "bad_label", True)
    assert graded.metadata["reward_error"] == "bad label"


async def test_weighted_sums():
    (outcome,) = await score(sample(r"<think>hm</think> \boxed{42}"), rm_type="math:1,format:0.5,f1:2")
    assert outcome.parts == {"math": 1.0, "format": 1.0, "f1": pytest.approx(outcome.parts["f1"])}
    assert outcome.score == pytest.approx(1.5 + 2 * outcome.parts["f1"])
    assert outcome.category == "correct"


async def test_groups_get_sums_too():
    rewards = dispatcher(rm_type="math:1,format:0.1")
    outcomes = await rewards.score_group([sample(), sample("<think>x</think> \\boxed{42}"), sample("y", label=None)])
    assert [outcome.score for outcome in outcomes] == [1.0, 1.1, 0.0]
    assert [outcome.failed for outcome in outcomes] == [False, False, True]
    await rewards.close()


async def test_a_mapping_without_a_number_to_add_is_a_mistake_of_the_configuration():
    with pytest.raises(ConfigError, match=r"mappings with the entries 'grade'.*--reward-key"):
        await score(sample(), rm_type="math:1,custom_rewards:mapping:1")


async def test_mappings_can_be_terms_of_a_sum():
    (outcome,) = await score(sample("Answer: 42"), rm_type="dapo:1, overlong", rollout_max_response_len=5000)
    assert outcome.score == 1.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rm_type": "mathh"}, "Did you mean 'math'"),
        ({"rm_type": "boxed_mathh"}, "Did you mean 'math'"),
        ({"rm_type": "math:1,form:0.1"}, "Did you mean 'format'"),
        ({"rm_type": "dapo"}, "--reward-key is None.*Set --reward-key score"),
        ({"rm_type": "math:nan"}, "math:nan is a float, not a function"),
        ({"rm_type": "hostile:not_a_function"}, "hostile:not_a_function is a int, not a function"),
        ({"rm_type": "remote_rm"}, "--rm-url"),
        ({"rm_type": "remote_rm", "rm_url": "localhost:8000"}, "--rm-url 'localhost:8000': expected an address like"),
        ({"rm_type": "remote_rm", "rm_url": "http://host:port/"}, "--rm-url 'http://host:port/': expected an address"),
        ({"rm_type": "overlong"}, "--rollout-max-response-len"),
        ({"rm_type": "overlong", "rollout_max_response_len": 10}, "--rm-overlong-buffer-len"),
        ({"rm_type": "boxed_random"}, "does not grade text"),
        ({"custom_rm_path": "hostile.not_there"}, "hostile has no 'not_there'"),
        ({"custom_rm_path": "hostile.not_a_function"}, "not a function"),
        ({"rm_type": "math", "rm_failure_values": {"late": 1.0}}, "'late' is no category"),
    ],
)
def test_flags_that_cannot_work_are_refused_before_the_run(flags, message):
    with pytest.raises(ConfigError, match=message):
        dispatcher(**flags)


async def test_a_sample_without_any_type_is_a_mistake_of_the_configuration():
    with pytest.raises(ConfigError, match="--rm-type or --custom-rm-path"):
        await score(sample())


async def test_a_mapping_without_the_wanted_entry_is_a_mistake_of_the_configuration():
    with pytest.raises(ConfigError, match="'score', 'acc', 'pred'"):
        await score(sample("Answer: 42", rm_type="dapo"), rm_type="math")


async def test_an_entry_that_is_no_number_is_a_failure_of_its_sample():
    (outcome,) = await score(sample(), custom_rm_path="custom_rewards.mapping", reward_key="grade")
    assert (outcome.category, outcome.failed, outcome.score) == ("bad_score", True, {"grade": 0.0})
    assert outcome.detail == "the reward's entry 'grade' is 'A'; it must be a number"


@pytest.mark.parametrize(
    ("rm_type", "one", "flags"),
    [
        ("dapo", sample("Answer: 42", "x"), {"rm_strict_upstream": True, "reward_key": "score"}),
        ("gpqa", sample("Answer: A", "A", choices=4), {}),
    ],
)
async def test_what_the_quick_way_cannot_read_fails_alone(rm_type, one, flags):
    (outcome,) = await score(one, rm_type=rm_type, **flags)
    assert (outcome.category, outcome.failed) == ("error", True)
    assert "Error: " in outcome.detail


async def test_evaluation_has_its_own_key_and_its_own_metrics():
    rewards = dispatcher(rm_type="dapo", reward_key="score", eval_reward_key="acc")
    await rewards.score(sample("Answer: 42"), evaluation=True)
    assert rewards.metrics() == {}
    metrics = rewards.metrics(evaluation=True)
    assert metrics["eval/reward/count"] == 1
    assert "rollout/reward/count" not in metrics
    assert rewards.metrics(evaluation=True) == {}
    await rewards.close()


async def test_metrics_tell_categories_and_latencies():
    rewards = dispatcher(rm_type="math")
    for one in (sample(), sample(label="41"), sample("no box"), sample(label=None)):
        await rewards.score(one)
    metrics = rewards.metrics()
    assert metrics["rollout/reward/count"] == 4
    assert metrics["rollout/reward/failed"] == 0.25
    assert {name for name in metrics if "category" in name} == {
        f"rollout/reward/category/{category}" for category in ("correct", "wrong", "no_answer", "bad_label")
    }
    assert 0 < metrics["rollout/reward/seconds_p50"] <= metrics["rollout/reward/seconds_max"]
    assert 0 < metrics["rollout/reward/bad_label_seconds_p50"] <= metrics["rollout/reward/seconds_max"]
    assert not any(name.startswith("rollout/reward/no_answer") for name in metrics)
    await rewards.close()


async def test_values_by_category():
    values = {"no_answer": -1.0, "bad_label": -2.0}
    outcomes = await score(sample("no box"), sample(label=None), sample(), rm_type="math", rm_failure_values=values)
    assert [outcome.score for outcome in outcomes] == [-1.0, -2.0, 1.0]


async def test_a_failure_of_a_mapping_is_a_mapping():
    (outcome,) = await score(
        sample("Answer: 42", None), rm_type="dapo", reward_key="score", rm_failure_values={"bad_label": 0.0}
    )
    assert outcome.failed
    assert outcome.score == {"score": 0.0, "acc": False, "pred": "[INVALID]"}


async def test_raise_ends_the_run_at_the_first_failure():
    with pytest.raises(RewardError, match=r"bad_label.*--rm-failure-action raise"):
        await score(sample(label=None), rm_type="math", rm_failure_action="raise")


async def test_failing_again_and_again_ends_the_run():
    bad = [sample(label=None)] * 3
    with pytest.raises(RewardError, match="4 gradings in a row failed"):
        await score(*bad, sample(label=None), rm_type="math", rm_max_consecutive_failures=4)
    assert len(await score(*bad, sample(), *bad, rm_type="math", rm_max_consecutive_failures=4)) == 7


async def test_random_rewards_repeat_with_the_seed():
    samples = [sample(index=index) for index in range(64)]
    first = await score(*samples, rm_type="random", rollout_seed=1)
    assert first == await score(*samples, rm_type="random", rollout_seed=1)
    assert first != await score(*samples, rm_type="random", rollout_seed=2)
    assert 16 < sum(outcome.score for outcome in first) < 48


async def test_deterministic_random_rewards_depend_on_the_content_alone():
    samples = [sample(str(index)) for index in range(64)]
    first = await score(*samples, rm_type="deterministic_random", rollout_seed=1)
    assert first == await score(*samples, rm_type="deterministic_random", rollout_seed=2)


async def test_long_answers_are_graded_in_workers_once():
    rewards = dispatcher(rm_type="math", rm_num_workers=1)
    long = sample(r"\boxed{" + "1+" * 200 + "1}", "201.0")
    first = await rewards.score(long)
    assert (await rewards.score(long)) is first
    assert first.category == "wrong"
    await rewards.close()


async def test_a_response_beyond_all_bounds_is_not_graded():
    (outcome,) = await score(sample("x" * 9_000_000), rm_type="math")
    assert (outcome.category, outcome.failed) == ("too_long", True)


async def test_users_coroutines_run_on_the_loop_with_a_deadline():
    assert [outcome.score for outcome in await score(sample(), custom_rm_path="custom_rewards.coroutine")] == [42.0]
    assert [outcome.score for outcome in await score(sample(), custom_rm_path="custom_rewards.instance")] == [3.0]
    (late,) = await score(sample(), custom_rm_path="custom_rewards.never", rm_timeout=0.05)
    assert late.category == "timeout"


async def test_users_functions_run_in_workers_with_a_deadline():
    first, second = await score(
        sample(), sample("hang"), custom_rm_path="custom_rewards.plain", rm_timeout=2.0, rm_num_workers=1
    )
    assert first.score == 42.0
    assert second.category == "timeout"


async def test_users_functions_see_the_configuration():
    (outcome,) = await score(sample(), custom_rm_path="custom_rewards.flag", my_value=7.0, rm_num_workers=1)
    assert outcome.score == 7.0


@pytest.mark.parametrize(
    ("function", "category"),
    [("fails", "error"), ("fails_async", "error"), ("nan", "bad_score"), ("words", "bad_score")],
)
async def test_failures_of_users_functions_are_outcomes(function, category):
    (outcome,) = await score(sample(), custom_rm_path=f"custom_rewards.{function}", rm_num_workers=1)
    assert (outcome.category, outcome.failed, outcome.score) == (category, True, 0.0)


async def test_a_failed_function_that_returns_mappings_gives_one():
    (outcome,) = await score(sample(), custom_rm_path="custom_rewards.fails_async", reward_key="acc")
    assert outcome.score == {"acc": 0.0}


async def test_cancelling_passes_through_users_coroutines():
    rewards = dispatcher(custom_rm_path="custom_rewards.never")
    task = asyncio.ensure_future(rewards.score(sample()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await rewards.close()


@pytest.mark.parametrize("function", ["group", "group_async"])
async def test_a_group_is_scored_in_one_call(function):
    rewards = dispatcher(custom_rm_path=f"custom_rewards.{function}", group_rm=True, rm_num_workers=1)
    outcomes = await rewards.score_group([sample(index=index) for index in range(4)])
    assert [outcome.score for outcome in outcomes] == [0.0, 1.0, 2.0, 3.0]
    assert (await rewards.score(sample(index=9))).score == 9.0
    await rewards.close()


async def test_a_group_function_must_return_one_reward_per_sample():
    rewards = dispatcher(custom_rm_path="custom_rewards.too_few", group_rm=True)
    outcomes = await rewards.score_group([sample(), sample()])
    assert [outcome.category for outcome in outcomes] == ["error", "error"]
    assert "list of 2 rewards" in outcomes[0].detail
    await rewards.close()


async def test_without_group_rm_a_group_is_its_samples():
    rewards = dispatcher(rm_type="math")
    outcomes = await rewards.score_group([sample(), sample(label="41"), sample(label=None)])
    assert [outcome.score for outcome in outcomes] == [1.0, 0.0, 0.0]
    await rewards.close()


async def test_types_of_third_parties_are_called_as_functions():
    assert [outcome.score for outcome in await score(sample(), rm_type="custom_rewards:coroutine")] == [42.0]


async def test_calling_a_type_grades_one_sample():
    math = Registry("miles.rewards").get("math")
    assert await math(None, sample()) == 1.0
    assert await math(None, sample(label=None)) == 0.0


async def test_grading_does_not_hold_up_the_event_loop():
    rewards = dispatcher(custom_rm_path="custom_rewards.plain", rm_timeout=0.4, rm_num_workers=2)
    await rewards.start()
    busy_s, tasks = 0.0, [asyncio.ensure_future(rewards.score(sample("hang"))) for _ in range(2)]
    while not all(task.done() for task in tasks):
        started = time.process_time()  # what this process computes between two turns: others may be slow at any time
        await asyncio.sleep(0.005)
        busy_s = max(busy_s, time.process_time() - started)
    assert [task.result().category for task in tasks] == ["timeout"] * 2
    assert busy_s < 0.1
    await rewards.close()


@pytest.mark.parametrize("rm_type", ["math", "boxed_f1"])
async def test_reading_a_long_response_is_left_to_workers(rm_type):
    response = r"\boxed{" + "{}" * 400_000 + "}"
    started = time.thread_time()
    last_boxed(response)
    reading_s = time.thread_time() - started
    rewards = dispatcher(rm_type=rm_type, rm_timeout=60)
    try:
        await rewards.score(sample("x" * 200_000))
        started = time.thread_time()
        outcome = await rewards.score(sample(response))
        assert time.thread_time() - started < reading_s / 2
    finally:
        await rewards.close()
    assert (outcome.score, outcome.failed) == (0.0, False)

"""The default rollout function over a fake engine: waves, filters, hooks, partial rollout."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from rollout_fakes import FakeRewards, FakeServer, FakeSource, Payload, answer

from miles.core.errors import RolloutError
from miles.core.types.rollout import DynamicFilterOutput, RolloutFnTrainOutput
from miles.core.types.sample import Group, Sample, Status
from miles.rollout.generate_state import GenerateState
from miles.rollout.generators.registry import Generators
from miles.rollout.hooks import Hooks
from miles.rollout.http import JsonClient
from miles.rollout.loop_thread import LoopThread
from miles.rollout.runtime import Runtime
from miles.rollout.sampling import SamplingSettings
from miles.rollout.sglang_rollout import generate_rollout
from miles.rollout.text import ChatTokenizer

Make = Callable[..., Any]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def make(server: FakeServer, tokenizer: ChatTokenizer) -> Iterator[Make]:
    """``args`` of a rollout function, with the runtime of a rollout role around the fake engine."""
    started: list[Runtime] = []

    def make(hooks: Hooks | None = None, rewards: FakeRewards | None = None, **values: Any) -> Any:
        args: Any = SimpleNamespace(
            rollout_batch_size=3,
            over_sampling_batch_size=3,
            dynamic_sampling_max_rounds=4,
            partial_rollout=False,
            mask_offpolicy_in_partial_rollout=False,
            group_rm=False,
            rollout_sample_retries=1,
            reward_key=None,
            rollout_seed=5,
            rollout_max_context_len=None,
            apply_chat_template_kwargs={},
        )
        vars(args).update(values)
        client = JsonClient(server.url, deadline_s=10, attempts=1)
        args.runtime = Runtime(
            args=args,
            loop=LoopThread(),
            state=GenerateState(args, tokenizer, client),
            generators=Generators(None),
            hooks=hooks or Hooks(),
            rewards=rewards or FakeRewards(lambda sample: float(sample.tokens[-1] % 2)),
            settings=SamplingSettings(max_response_len=8),
            max_in_flight=64,
            engine_urls=lambda: [server.url],
        )
        started.append(args.runtime)
        return args

    yield make
    for runtime in started:
        runtime.loop.run(runtime.state.client.close())
        runtime.loop.stop()


def rollout(args: Any, source: FakeSource, rollout_id: int = 0) -> RolloutFnTrainOutput:
    output = generate_rollout(args, rollout_id, source)
    assert isinstance(output, RolloutFnTrainOutput)
    return output


def numbers(groups: list[Group]) -> list[Any]:
    return [group[0].group_index for group in groups]


def prompt_number(payload: Payload) -> int:
    """Of ``prompt N``: the token of a digit is its byte's place in the alphabet."""
    ids = payload["input_ids"][0] if isinstance(payload["input_ids"][0], list) else payload["input_ids"]
    return int(ids[7] + 33 - ord("0"))


def drop_odd(args: Any, samples: Group) -> DynamicFilterOutput:
    odd = (samples[0].group_index or 0) % 2 == 1
    return DynamicFilterOutput(not odd, "odd" if odd else None)


def keep_even(args: Any, samples: Group) -> bool:
    return (samples[0].group_index or 0) % 2 == 0


def test_groups_come_in_order_of_index(make: Make) -> None:
    output = rollout(make(), FakeSource())
    assert [sample.index for group in output.samples for sample in group] == [0, 1, 2, 3, 4, 5]
    assert all(sample.status is Status.COMPLETED for group in output.samples for sample in group)


@pytest.mark.parametrize("verdict", [drop_odd, keep_even])
def test_the_dynamic_filter_drops_groups(make: Make, verdict: Any) -> None:
    output = rollout(make(Hooks(dynamic_filter=verdict)), FakeSource())
    assert numbers(output.samples) == [0, 2, 4]
    name = "odd" if verdict is drop_odd else "no_reason"
    assert output.metrics == {f"rollout/dynamic_filter/drop_{name}": 2}


def test_surplus_is_aborted_and_given_back(make: Make, server: FakeServer) -> None:
    server.hold = lambda payload: prompt_number(payload) >= 4
    source = FakeSource()
    output = rollout(make(over_sampling_batch_size=6), source)
    assert numbers(output.samples) == [0, 1, 2]
    assert numbers(source.buffer) == [3, 4, 5]
    assert all(not sample.tokens for group in source.buffer for sample in group)
    assert server.num_aborts >= 1
    server.hold = lambda payload: False
    assert numbers(rollout(make(), source).samples) == [3, 4, 5]


def test_partial_rollout_continues_what_was_cut(make: Make, server: FakeServer) -> None:
    server.hold = lambda payload: prompt_number(payload) == 0
    source = FakeSource()
    args = make(over_sampling_batch_size=4, partial_rollout=True)
    first = rollout(args, source, rollout_id=7)
    assert numbers(first.samples) == [1, 2, 3]
    assert numbers(source.buffer) == [0]
    cut = source.buffer[0][0]
    assert (cut.status, cut.response_length, cut.metadata["start_rollout_id"]) == (Status.ABORTED, 2, 7)
    tokens = list(cut.tokens)
    server.hold = lambda payload: False
    second = rollout(args, source, rollout_id=8)
    continued = next(group for group in second.samples if group[0].group_index == 0)[0]
    assert continued.tokens[: len(tokens)] == tokens
    assert (continued.response_length, continued.status) == (6, Status.COMPLETED)
    assert continued.reward is not None


def test_when_every_request_fails_the_report_says_so(make: Make, server: FakeServer) -> None:
    server.respond = lambda payload: 400
    with pytest.raises(RolloutError, match=r"failed: http://.*answered 400: as the test wants"):
        rollout(make(), FakeSource())


def test_one_failing_group_is_replaced_and_counted(make: Make, server: FakeServer) -> None:
    server.respond = lambda payload: 400 if prompt_number(payload) == 1 else answer(payload)
    output = rollout(make(), FakeSource())
    assert numbers(output.samples) == [0, 2, 3]
    assert output.metrics["rollout/failed_groups"] == 1


def test_hooks_get_what_is_documented_and_never_run_on_the_loop(make: Make) -> None:
    seen: dict[str, Any] = {}

    def sample_filter(args: Any, samples: list[Group]) -> None:
        seen["filter"] = (args.rollout_batch_size, numbers(samples), threading.current_thread().name)
        samples[0][0].remove_sample = True

    def all_samples(args: Any, all_samples: list[Group], data_source: Any) -> None:
        seen["all"] = (numbers(all_samples), data_source, threading.current_thread().name)

    def dynamic(args: Any, samples: Group) -> DynamicFilterOutput:
        seen["dynamic"] = threading.current_thread().name
        return drop_odd(args, samples)

    source = FakeSource()
    hooks = Hooks(dynamic_filter=dynamic, sample_filter=sample_filter, all_samples=all_samples)
    output = rollout(make(hooks), source)
    assert output.samples[0][0].remove_sample
    assert seen["filter"][:2] == (3, [0, 2, 4])
    assert seen["all"][:2] == ([0, 1, 2, 3, 4], source)
    assert "miles-rollout" not in {seen["dynamic"], seen["filter"][2], seen["all"][2]}


def test_group_rewards_are_given_to_whole_groups(make: Make) -> None:
    output = rollout(make(group_rm=True, rewards=FakeRewards(group_rm=True)), FakeSource())
    assert all(sorted(sample.reward for sample in group) == [0.0, 1.0] for group in output.samples)


async def own_generator(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    sample.tokens, sample.response_length, sample.status = [42, 43], 1, Status.COMPLETED
    return sample


def test_a_sample_may_have_a_generator_of_its_own(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_fakes.own_generator", own_generator, raising=False)
    source = FakeSource()
    source.add_samples(source.get_samples(1))
    source.buffer[0][1].generate_function_path = "rollout_fakes.own_generator"
    output = rollout(make(), source)
    assert output.samples[0][1].tokens == [42, 43]
    assert output.samples[0][0].tokens != [42, 43]

"""Every hook of the rollout side is called with exactly the signature that ``miles.core.types.hook_table`` states."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rollout_fakes import write_jsonl
from test_manager import Make, make, prompts, rewards, server  # noqa: F401  fixtures

from miles.core.types.hook_table import HOOKS
from miles.core.types.rollout import DynamicFilterOutput, GenerateFnInput, GenerateFnOutput
from miles.core.types.sample import Sample, Status

HERE = Path(__file__).stem
LOOP_THREAD = "miles-rollout"


def finish(sample: Sample) -> Sample:
    sample.tokens, sample.response_length, sample.status = [1, 2, 3], 2, Status.COMPLETED
    sample.rollout_log_probs = [-0.5, -0.5]
    return sample


def take_first(args: Any, rollout_id: Any, buffer: list[Any], num_samples: int) -> Any:
    taken = buffer[:num_samples]
    del buffer[:num_samples]
    return taken


BEHAVIOUR: dict[str, Callable[..., Any]] = {
    "dynamic_sampling_filter_path": lambda args, samples: DynamicFilterOutput(samples[0].group_index % 2 == 0),
    "buffer_filter_path": take_first,
    "rollout_sample_filter_path": lambda args, samples: None,
    "rollout_all_samples_process_path": lambda args, all_samples, data_source: None,
    "custom_reward_post_process_path": lambda args, samples: ([1.0] * len(samples), [2.0] * len(samples)),
    "custom_rollout_log_function_path": lambda **given: False,
    "custom_eval_rollout_log_function_path": lambda **given: False,
}
"""By field; what the hook does with arguments that fit its signature."""


class Recorder:
    """A hook: refuses every call that its protocol does not allow, and notes the others."""

    def __init__(self, field: str) -> None:
        self.signature = inspect.signature(vars(HOOKS[field][0])["__call__"])
        self.field, self.calls, self.threads = field, list[dict[str, Any]](), set[str]()

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        bound = self.signature.bind(self, *args, **keywords)
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        self.calls.append(given)
        self.threads.add(threading.current_thread().name)
        return BEHAVIOUR[self.field](**given)


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])
    recorders = {field: Recorder(field) for field in BEHAVIOUR}
    for field, recorder in recorders.items():
        monkeypatch.setattr(sys.modules[__name__], field, recorder, raising=False)
    return recorders


def test_a_rollout_and_an_evaluation_call_every_hook_as_stated(
    make: Make,  # noqa: F811
    hooks: dict[str, Recorder],
    tmp_path: Path,
) -> None:
    data = write_jsonl(tmp_path / "eval.jsonl", [{"input": "p1", "answer": 1}])
    paths = {field: f"{HERE}.{field}" for field in hooks}
    evaluation = {"eval_interval": 1, "eval_prompt_data": ["mine", str(data)], "eval_label_key": "answer"}
    role = make(over_sampling_batch_size=4, **evaluation, **paths)
    role.generate(0)
    role.generate(1)
    role.evaluate(1)
    assert {field for field, recorder in hooks.items() if not recorder.calls} == set()
    assert {field for field, recorder in hooks.items() if LOOP_THREAD in recorder.threads} == set()
    assert all(not name.startswith(LOOP_THREAD) for recorder in hooks.values() for name in recorder.threads)
    first = {field: recorder.calls[0] for field, recorder in hooks.items()}
    assert first["custom_rollout_log_function_path"]["rollout_id"] == 0
    assert set(first["custom_eval_rollout_log_function_path"]["data"]) == {"mine"}
    assert first["buffer_filter_path"]["rollout_id"] is None
    assert all(call["args"].rollout_batch_size == 3 for call in first.values())


async def generate_fn(input: GenerateFnInput) -> GenerateFnOutput:
    assert input.state.args.rollout_batch_size == 3
    assert input.sampling_params["sampling_seed"] >= 0
    return GenerateFnOutput(finish(input.sample))


async def legacy_generate(
    args: Any, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
) -> Sample:
    assert (args.rollout_batch_size, evaluation) == (3, False)
    return finish(sample)


class GenerateClass:
    async def __call__(self, input: GenerateFnInput) -> GenerateFnOutput:
        return GenerateFnOutput(finish(input.sample))


@pytest.mark.parametrize("name", ["generate_fn", "legacy_generate", "GenerateClass"])
def test_generate_functions_of_every_form(make: Make, hooks: dict[str, Recorder], name: str) -> None:  # noqa: F811
    batch = make(custom_generate_function_path=f"{HERE}.{name}").generate(0).batch
    assert [tokens.tolist() for tokens in batch.tokens] == [[1, 2, 3]] * 6


class RolloutClass:
    """Both halves in one object."""

    def __init__(self, input: Any) -> None:
        self.source = input.data_source
        self.seen: list[Any] = []

    async def __call__(self, input: Any) -> Any:
        self.seen.append(type(input).__name__)
        if hasattr(input, "hf_dir"):
            return {
                "mine": {"rewards": [0.5], "truncated": [False], "samples": []},
            }
        groups = self.source.get_samples(3)
        for group in groups:
            for sample in group:
                finish(sample).reward = float(input.weight_version)
        return groups


def test_a_rollout_class_makes_rollouts_and_evaluations(make: Make, hooks: dict[str, Recorder]) -> None:  # noqa: F811
    path = f"{HERE}.RolloutClass"
    role = make(rollout_function_path=path, eval_function_path=path)
    role.weights_updated(7, [])
    assert set(role.generate(0).batch.raw_rewards) == {7.0}
    assert role.evaluate(0)["eval/mine"] == 0.5

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rollout_fakes import FakeLauncher, FakeRewards, FakeServer, Payload, answer, write_jsonl

from miles.core.config import Config
from miles.core.errors import CheckpointError, ConfigError, EngineError, RolloutError
from miles.core.types.rollout import EvalResult, RolloutFnEvalOutput, RolloutFnTrainOutput
from miles.core.types.sample import Sample, Status
from miles.rollout import manager as manager_module
from miles.rollout.data_source import RolloutDataSourceWithBuffer
from miles.rollout.manager import RolloutManager

Make = Callable[..., RolloutManager]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def rewards(monkeypatch: pytest.MonkeyPatch) -> FakeRewards:
    fake = FakeRewards(lambda sample: float(sample.tokens[-1] % 2))

    class Dispatchers:
        def get(self, name: str) -> Any:
            return lambda config: fake

    monkeypatch.setattr(manager_module, "DISPATCHERS", Dispatchers())
    return fake


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", [{"input": f"p{n}", "answer": n} for n in range(6)])


@pytest.fixture
def make(server: FakeServer, rewards: FakeRewards, prompts: Path, checkpoint: str, tmp_path: Path) -> Iterator[Make]:
    started: list[RolloutManager] = []
    FakeLauncher.server, FakeLauncher.specs, FakeLauncher.engines = server, [], []

    def make(run: str = "run", **values: Any) -> RolloutManager:
        given = {
            "hf_checkpoint": checkpoint,
            "prompt_data": str(prompts),
            "label_key": "answer",
            "rollout_engine": "rollout_fakes:FakeLauncher",
            "rollout_num_engines": 1,
            "device": "cpu",
            "sglang_router_ip": "127.0.0.1",
            "sglang_router_port": server.port,
            "rollout_batch_size": 3,
            "n_samples_per_prompt": 2,
            "rollout_max_response_len": 8,
            **values,
        }
        role = RolloutManager(Config.of(**given), tmp_path / run)
        started.append(role)
        role.launch()
        role.wait_ready()
        return role

    yield make
    for role in started:
        role.stop()


def test_a_rollout_becomes_a_batch(make: Make, tmp_path: Path) -> None:
    result = make().generate(4)
    batch = result.batch
    assert batch.rollout_id == 4
    assert batch.sample_indices == (0, 1, 2, 3, 4, 5)
    assert batch.group_indices == (0, 0, 1, 1, 2, 2)
    assert batch.response_lengths == (4,) * 6
    assert all(mask.tolist() == [1.0] * 4 for mask in batch.loss_masks)
    assert batch.rollout_log_probs is not None
    assert [len(values) for values in batch.rollout_log_probs] == [4] * 6
    assert set(batch.raw_rewards) <= {0.0, 1.0}
    assert result.metrics["rollout/raw_reward"] == pytest.approx(sum(batch.raw_rewards) / 6)
    assert result.metrics["rollout/response_len/mean"] == 4
    assert result.metrics["rollout/reward/count"] == 6
    assert result.metrics["perf/rollout_time"] > 0


def test_samples_are_written_readably(make: Make, tmp_path: Path) -> None:
    batch = make().generate(4).batch
    lines = (tmp_path / "run/rollouts/rollout_0000004.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 6
    assert (first["prompt"], first["label"], first["status"], first["index"]) == ("p0", 0, "completed", 0)
    assert first["tokens"] == batch.tokens[0].tolist()
    assert first["weight_versions"] == ["3"]
    assert len(first["pieces"]) == len(first["rollout_log_probs"]) == 4


def test_requests_carry_ids_seeds_and_parameters(make: Make, server: FakeServer) -> None:
    make(rollout_temperature=0.5, rollout_top_p=0.9, rollout_stop=["\n"], rollout_stop_token_ids=[7]).generate(0)
    payload = min(server.payloads, key=lambda payload: payload["input_ids"])
    assert payload["input_ids"] == [ord("p") - 33, ord("0") - 33]
    assert payload["return_logprob"] is True
    params = payload["sampling_params"]
    assert (params["temperature"], params["top_p"], params["top_k"], params["max_new_tokens"]) == (0.5, 0.9, -1, 8)
    assert (params["stop"], params["stop_token_ids"], params["no_stop_trim"]) == (["\n"], [7], True)
    seeds = {payload["sampling_params"]["sampling_seed"] for payload in server.payloads}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_the_same_run_gives_the_same_batches_whatever_the_timing(make: Make, server: FakeServer) -> None:
    first = make("a", rollout_shuffle=True)
    batches = [first.generate(number).batch for number in range(3)]
    server.payloads.clear()
    again = make("b", rollout_shuffle=True)
    for number, batch in enumerate(batches):
        other = again.generate(number).batch
        assert [tokens.tolist() for tokens in other.tokens] == [tokens.tolist() for tokens in batch.tokens]
        assert other.rewards == batch.rewards


def test_a_restored_role_goes_on_exactly(make: Make, tmp_path: Path) -> None:
    role = make("a")
    role.generate(0)
    (tmp_path / "state").mkdir()
    role.save(tmp_path / "state")
    expected = role.generate(1).batch
    restored = make("b")
    restored.load(tmp_path / "state")
    got = restored.generate(1).batch
    assert got.sample_indices == expected.sample_indices
    assert [tokens.tolist() for tokens in got.tokens] == [tokens.tolist() for tokens in expected.tokens]


def test_a_missing_state_is_an_error(make: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rollout\.json cannot be read"):
        make().load(tmp_path)


class OwnSource(RolloutDataSourceWithBuffer):
    """A data source with a way to save of its own."""

    events: ClassVar[list[Any]] = []

    def save(self, rollout_id: int) -> None:
        self.events.append(("save", rollout_id))

    def load(self, rollout_id: int | None = None) -> None:
        self.events.append(("load", rollout_id))


def test_a_data_source_of_the_users_saves_and_loads_itself(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout_fakes.OwnSource", OwnSource, raising=False)
    role = make(data_source_path="rollout_fakes:OwnSource")
    role.generate(5)
    role.save(tmp_path)
    role.load(tmp_path)
    assert OwnSource.events == [("save", 5), ("load", 5)]


def test_rollouts_per_epoch_are_counted(make: Make) -> None:
    assert make(rollout_batch_size=4).num_rollouts_per_epoch() == 1
    assert make(rollout_global_dataset=False, prompt_data=None).num_rollouts_per_epoch() is None


def test_engines_get_their_share(make: Make, tmp_path: Path) -> None:
    role = make(rollout_num_engines=2, engine_num_threads=3, rollout_max_context_len=64, seed=10)
    first, second = FakeLauncher.specs
    assert (first.index, first.seed, second.index, second.seed) == (0, 10, 1, 11)
    assert (first.num_threads, first.context_length, first.num_gpus) == (3, 64, 0)
    assert first.port != second.port
    assert first.log_path == tmp_path / "run/logs/engine-0.log"
    assert role.engine_urls() == [FakeLauncher.server.url] * 2


def test_stop_ends_everything_and_may_be_repeated(make: Make, rewards: FakeRewards) -> None:
    role = make()
    role.stop()
    role.stop()
    assert FakeLauncher.engines[0].stopped
    assert rewards.closed


def test_a_dead_engine_ends_the_rollout(make: Make, server: FakeServer) -> None:
    server.hold = lambda payload: True
    role = make()
    FakeLauncher.engines[0].dead = True
    with pytest.raises(EngineError, match="has ended"):
        role.generate(0)


def test_evaluation_covers_every_data_set(make: Make, tmp_path: Path, server: FakeServer) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [{"input": f"a{n}", "answer": n} for n in range(3)])
    b = write_jsonl(tmp_path / "b.jsonl", [{"input": "b0", "answer": 0}])
    role = make(
        eval_interval=1,
        eval_prompt_data=["first", str(a), "second", str(b)],
        n_samples_per_eval_prompt=2,
        eval_temperature=0.0,
        eval_max_response_len=5,
    )
    metrics = role.evaluate(7)
    assert 0 <= metrics["eval/first"] <= 1
    assert metrics["eval/second/response_len/mean"] == 4
    assert metrics["eval/first-truncated_ratio"] == 0
    assert metrics["eval/reward/count"] == 1
    assert "rollout/reward/count" not in metrics
    assert {"eval/first-pass@1", "eval/first-pass@2"} <= set(metrics)
    assert {payload["sampling_params"]["temperature"] for payload in server.payloads} == {0.0}
    lines = (tmp_path / "run/rollouts/eval_0000007_first.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert role.evaluate(8) == metrics


def test_an_evaluation_data_set_may_have_its_own_reward_and_metadata(
    make: Make, tmp_path: Path, rewards: FakeRewards
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"input": "a", "answer": 1, "metadata": {"k": 0, "l": 0}}])
    spec = {"name": "x", "path": str(path), "rm_type": "f1", "metadata_overrides": {"k": 1}}
    (tmp_path / "eval.yaml").write_text(json.dumps({"datasets": [spec]}))
    make(eval_interval=1, eval_config=str(tmp_path / "eval.yaml")).evaluate(0)
    line = json.loads((tmp_path / "run/rollouts/eval_0000000_x.jsonl").read_text())
    assert line["metadata"] == {"k": 1, "l": 0, "rm_type": "f1", "reward_category": "scored"}


def test_failed_samples_of_an_evaluation_are_left_out_and_shown(make: Make, tmp_path: Path, server: FakeServer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"input": "good", "answer": 1}, {"input": "bad", "answer": 1}])
    bad = ord("b") - 33
    server.respond = lambda payload: 400 if payload["input_ids"][0] == bad else answer(payload)
    role = make(eval_interval=1, eval_prompt_data=["x", str(path)])
    metrics = role.evaluate(0)
    assert metrics["eval/x-failed_ratio"] == 0.5
    assert metrics["eval/x/response_len/mean"] == 4
    server.respond = lambda payload: 400
    with pytest.raises(EngineError, match="evaluation data set 'x': every sample failed"):
        role.evaluate(1)


def test_group_rewards_judge_evaluations_as_well(make: Make, tmp_path: Path, rewards: FakeRewards) -> None:
    rewards._group_rm = True
    path = write_jsonl(tmp_path / "a.jsonl", [{"input": f"a{n}", "answer": 1} for n in range(3)])
    role = make(group_rm=True, eval_interval=1, eval_prompt_data=["x", str(path)], n_samples_per_eval_prompt=2)
    role.evaluate(0)
    lines = (tmp_path / "run/rollouts/eval_0000000_x.jsonl").read_text().splitlines()
    found = [json.loads(line)["reward"] for line in lines]
    assert [sorted(found[start : start + 2]) for start in (0, 2, 4)] == [[0.0, 1.0]] * 3


def test_evaluation_does_not_move_training(make: Make, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"input": "a", "answer": 1}])
    evaluated = make("a", eval_interval=1, eval_prompt_data=["x", str(path)])
    evaluated.evaluate(0)
    plain = make("b")
    assert [t.tolist() for t in evaluated.generate(0).batch.tokens] == [
        t.tolist() for t in plain.generate(0).batch.tokens
    ]


def test_a_replay_trains_on_the_files_of_another_run(make: Make, tmp_path: Path) -> None:
    original = make("a").generate(0)
    pattern = str(tmp_path / "a/rollouts/rollout_{rollout_id:07d}.jsonl")
    replay = make("b", load_debug_rollout_data=pattern, prompt_data=None)
    assert replay.engine_urls() == []
    replayed = replay.generate(0)
    assert [t.tolist() for t in replayed.batch.tokens] == [t.tolist() for t in original.batch.tokens]
    assert replayed.batch.rewards == original.batch.rewards
    share = {"load_debug_rollout_data_subsample": 0.7, "num_steps_per_rollout": 3}
    part = make("c", load_debug_rollout_data=pattern, prompt_data=None, **share)
    assert part.generate(0).batch.group_indices == (0, 0, 2, 2)


def test_debug_data_is_a_second_copy(make: Make, tmp_path: Path) -> None:
    make(save_debug_rollout_data=str(tmp_path / "debug/{rollout_id}.jsonl")).generate(2)
    copied = (tmp_path / "debug/2.jsonl").read_bytes()
    assert copied == (tmp_path / "run/rollouts/rollout_0000002.jsonl").read_bytes()


def own_rollout(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    if evaluation:
        return {"mine": {"rewards": [1.0, 0.0], "truncated": [False, True], "samples": []}}
    groups = data_source.get_samples(args.rollout_batch_size)
    for group in groups:
        for sample in group:
            sample.tokens, sample.response_length, sample.reward = [1, 2], 1, float(sample.index)
            sample.status = Status.COMPLETED
    return [[[first], [second]] for first, second in groups]


async def own_async_rollout(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    return RolloutFnTrainOutput(own_rollout(args, rollout_id, data_source), {"rollout/mine": 1.0})


def one_group_more(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    return [*own_rollout(args, rollout_id, data_source), own_rollout(args, rollout_id, data_source)[0]]


def one_group_less(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    return own_rollout(args, rollout_id, data_source)[1:]


def no_rollout(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    return []


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of this file under a name that a flag can say."""
    for function in (
        own_rollout,
        own_async_rollout,
        one_group_more,
        one_group_less,
        no_rollout,
        suppress_rollout_log,
        suppress_eval_log,
        post_process,
        convert,
    ):
        monkeypatch.setattr(f"rollout_fakes.{function.__name__}", function, raising=False)
    LOGGED.clear()


def test_rollout_functions_of_the_older_form_work(make: Make) -> None:
    role = make(rollout_function_path="rollout_fakes.own_rollout")
    assert role.generate(0).batch.raw_rewards == (0, 1, 2, 3, 4, 5)


def test_an_evaluation_of_the_older_form_works(make: Make) -> None:
    role = make(eval_function_path="rollout_fakes.own_rollout")
    metrics = role.evaluate(0)
    assert (metrics["eval/mine"], metrics["eval/mine-truncated_ratio"]) == (0.5, 0.5)


def test_asynchronous_rollout_functions_work(make: Make) -> None:
    result = make(rollout_function_path="rollout_fakes:own_async_rollout").generate(0)
    assert result.metrics["rollout/mine"] == 1.0


def test_a_rollout_function_without_samples_is_named(make: Make) -> None:
    with pytest.raises(RolloutError, match="--rollout-function-path: rollout 0 has no samples"):
        make(rollout_function_path="rollout_fakes:no_rollout").generate(0)


LOGGED: list[Any] = []


def suppress_rollout_log(
    rollout_id: int, args: Any, samples: list[Sample], rollout_extra_metrics: Any, rollout_time: float
) -> bool:
    LOGGED.append((rollout_id, args.rollout_batch_size, len(samples), rollout_time > 0))
    return True


def suppress_eval_log(rollout_id: int, args: Any, data: Any, extra_metrics: Any) -> bool:
    LOGGED.append((rollout_id, args.rollout_batch_size, {name: set(found) for name, found in data.items()}))
    return True


def test_log_hooks_are_called_and_may_replace_the_metrics(make: Make) -> None:
    role = make(
        custom_rollout_log_function_path="rollout_fakes.suppress_rollout_log",
        custom_eval_rollout_log_function_path="rollout_fakes.suppress_eval_log",
        eval_function_path="rollout_fakes.own_rollout",
    )
    assert role.generate(3).metrics == {}
    assert role.evaluate(3) == {}
    assert [(3, 3, 6, True), (3, 3, {"mine": {"rewards", "truncated", "samples"}})] == LOGGED


def post_process(args: Any, samples: list[Sample]) -> tuple[list[float], list[float]]:
    return [1.0] * len(samples), [float(args.rollout_batch_size)] * len(samples)


def convert(args: Any, samples: list[Sample]) -> dict[str, Any]:
    return {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "rewards": [5.0] * len(samples),
        "colour": ["red"] * len(samples),
    }


def test_reward_post_processing_can_be_replaced(make: Make) -> None:
    batch = make(custom_reward_post_process_path="rollout_fakes.post_process").generate(0).batch
    assert (set(batch.raw_rewards), set(batch.rewards)) == ({1.0}, {3.0})


def test_the_conversion_can_be_replaced(make: Make) -> None:
    batch = make(custom_convert_samples_to_train_data_path="rollout_fakes.convert").generate(0).batch
    assert set(batch.rewards) == {5.0}
    assert batch.extra == {"colour": ("red",) * 6}


def test_samples_that_do_not_fill_a_step_are_trimmed_unless_told_otherwise(make: Make) -> None:
    values = {"rollout_function_path": "rollout_fakes.one_group_more"}
    assert len(make("a", **values).generate(0).batch) == 6
    assert len(make("b", rollout_trim_samples=False, **values).generate(0).batch) == 8
    with pytest.raises(RolloutError, match="rollout 0 has 8 samples, less than --global-batch-size 10"):
        make("c", rollout_batch_size=5, rollout_function_path="rollout_fakes.one_group_less").generate(0)


def test_supervised_fine_tuning_starts_no_engine(make: Make, tmp_path: Path, server: FakeServer) -> None:
    path = write_jsonl(tmp_path / "sft.jsonl", [{"input": f"q{n}", "answer": f"a{n}"} for n in range(4)])
    role = make(loss_type="sft_loss", prompt_data=str(path), n_samples_per_prompt=1)
    result = role.generate(0)
    assert FakeLauncher.engines == []
    assert role.engine_urls() == []
    assert len(result.batch) == 3
    assert result.batch.rollout_log_probs is None
    assert "rollout/raw_reward" not in result.metrics


def test_supervised_fine_tuning_with_evaluation_starts_engines(make: Make, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "sft.jsonl", [{"input": f"q{n}", "answer": f"a{n}"} for n in range(4)])
    role = make(
        loss_type="sft_loss",
        prompt_data=str(path),
        n_samples_per_prompt=1,
        eval_interval=1,
        eval_prompt_data=["x", str(path)],
    )
    assert 0 <= role.evaluate(0)["eval/x"] <= 1
    assert len(role.generate(0).batch) == 3


def test_a_checkpoint_is_required(make: Make) -> None:
    with pytest.raises(ConfigError, match="--hf-checkpoint is not set"):
        make(hf_checkpoint=None)


def test_a_sample_that_fails_once_is_tried_again(make: Make, server: FakeServer) -> None:
    failed: set[str] = set()

    def fail_once(payload: Payload) -> Any:
        key = json.dumps(payload)
        if key in failed:
            return answer(payload)
        failed.add(key)
        return 400

    server.respond = fail_once
    assert len(make().generate(0).batch) == 6


def test_results_of_functions_are_typed() -> None:
    output = RolloutFnEvalOutput({"x": EvalResult([1.0], [False], [])})
    assert manager_module._as_eval_output(output) is output

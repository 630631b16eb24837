from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_fakes import write_jsonl

from miles.core.config import Config
from miles.core.errors import CheckpointError, ConfigError
from miles.core.types.sample import Group, Sample, Status
from miles.rollout.data.prompts import PromptFormat
from miles.rollout.data_source import RolloutDataSource, RolloutDataSourceWithBuffer, prompt_format


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"input": f"p{number}", "metadata": {"number": number, "list": [1]}} for number in range(5)]
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "p.jsonl", rows)


def make(prompts: Path, **values: Any) -> RolloutDataSourceWithBuffer:
    return RolloutDataSourceWithBuffer(Config.of(**{"prompt_data": str(prompts), "n_samples_per_prompt": 2, **values}))


def names(groups: list[Group]) -> list[Any]:
    return [group[0].prompt for group in groups]


def test_groups_hold_fresh_samples_with_indices_that_count_up(prompts: Path) -> None:
    groups = make(prompts).get_samples(2)
    assert [[(sample.group_index, sample.index) for sample in group] for group in groups] == [
        [(0, 0), (0, 1)],
        [(1, 2), (1, 3)],
    ]
    assert groups[0][0].metadata == {"number": 0, "list": [1]}
    assert groups[0][0].metadata["list"] is not groups[0][1].metadata["list"]


def test_flags_say_how_rows_become_prompts() -> None:
    keys = {"input_key": "q", "label_key": "a", "metadata_key": "m", "tool_key": "t"}
    more: dict[str, Any] = {"apply_chat_template": True, "multimodal_keys": {"image": "pictures"}}
    found = prompt_format(Config.of(**keys, **more, apply_chat_template_kwargs={"loud": True}))
    assert found == PromptFormat(**keys, **more, chat_template_kwargs={"loud": True})


@settings(max_examples=30)
@given(requests=st.lists(st.integers(0, 13), min_size=1, max_size=6), shuffle=st.booleans())
def test_any_requests_give_the_same_endless_stream(prompts: Path, requests: list[int], shuffle: bool) -> None:
    source = make(prompts, rollout_shuffle=shuffle)
    got = [source.get_samples(count) for count in requests]
    assert [len(groups) for groups in got] == requests
    whole = make(prompts, rollout_shuffle=shuffle).get_samples(sum(requests))
    assert [group for groups in got for group in groups] == whole
    for start in range(0, len(whole) - 4, 5):
        assert sorted(names(whole[start : start + 5])) == [f"p{number}" for number in range(5)]


def test_every_epoch_is_shuffled_anew_without_the_global_generator(prompts: Path) -> None:
    source = make(prompts, rollout_shuffle=True, rollout_seed=3)
    np.random.seed(0)
    first = names(source.get_samples(5))
    np.random.seed(1)
    assert first == names(make(prompts, rollout_shuffle=True, rollout_seed=3).get_samples(5))
    assert first != names(source.get_samples(5))


def test_groups_given_back_come_first_oldest_prompt_first(prompts: Path) -> None:
    source = make(prompts)
    groups = source.get_samples(4)
    source.add_samples([groups[3]])
    source.add_samples([groups[1]])
    assert source.get_buffer_length() == 2
    assert source.get_samples(3)[:2] == [groups[1], groups[3]]
    assert source.get_buffer_length() == 0


def test_a_group_of_the_wrong_size_is_not_taken_back(prompts: Path) -> None:
    with pytest.raises(ValueError, match="a group of 1 samples was given back, expected 2"):
        make(prompts).add_samples([[Sample()]])


def take_last(args: Any, rollout_id: int | None, buffer: list[Group], num_samples: int) -> list[Group]:
    assert rollout_id is None
    return [buffer.pop()]


def test_the_buffer_filter_chooses(prompts: Path) -> None:
    source = make(prompts, buffer_filter_path="miles.rollout.filter_hub.buffer_filters.pop_first")
    source.buffer_filter = take_last
    groups = source.get_samples(3)
    source.add_samples(groups)
    assert source.get_samples(1) == [groups[2]]


def test_a_buffer_filter_that_returns_too_much_is_refused(prompts: Path) -> None:
    source = make(prompts)
    source.buffer_filter = lambda args, rollout_id, buffer, num_samples: list(buffer)
    source.add_samples(source.get_samples(3))
    with pytest.raises(ValueError, match="returned 3 groups, asked for at most"):
        source.get_samples(1)


@settings(max_examples=20)
@given(before=st.integers(0, 12), after=st.integers(1, 12), returned=st.integers(0, 3), shuffle=st.booleans())
def test_a_restored_source_goes_on_exactly(
    prompts: Path, tmp_path_factory: pytest.TempPathFactory, before: int, after: int, returned: int, shuffle: bool
) -> None:
    source = make(prompts, rollout_shuffle=shuffle)
    groups = source.get_samples(before)
    for group in groups[:returned]:
        group[0].tokens, group[0].rollout_log_probs, group[0].response_length = [1, 2, 3], [-0.1, -1e-17], 2
        group[0].status, group[0].rollout_routed_experts = Status.ABORTED, np.ones((2, 1, 2), np.int32)
    source.add_samples(groups[:returned])
    path = tmp_path_factory.mktemp("state") / "state.json"
    source.save_to(path)
    restored = make(prompts, rollout_shuffle=shuffle)
    restored.load_from(path)
    assert _plain(restored.get_samples(after)) == _plain(source.get_samples(after))


def _plain(groups: list[Group]) -> list[Any]:
    dicts = [sample.to_dict() for group in groups for sample in group]
    for values in dicts:
        if values["rollout_routed_experts"] is not None:
            values["rollout_routed_experts"] = values["rollout_routed_experts"].tolist()
    return dicts


def test_a_position_in_other_prompts_is_refused(prompts: Path, tmp_path: Path) -> None:
    make(prompts).save_to(tmp_path / "state.json")
    other = make(prompts, n_samples_per_prompt=3, rollout_seed=1)
    with pytest.raises(CheckpointError, match="rollout_seed was 42, now 1; n_samples_per_prompt was 2, now 3"):
        other.load_from(tmp_path / "state.json")


def test_a_torn_state_is_named(prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"format": 1, "epo')
    with pytest.raises(CheckpointError, match=r"state\.json: the data source's state cannot be read"):
        make(prompts).load_from(tmp_path / "state.json")


def test_the_documented_save_and_load_use_the_run_directories(prompts: Path, tmp_path: Path) -> None:
    source = make(prompts, save=str(tmp_path))
    source.get_samples(3)
    source.save(7)
    restored = make(prompts, load=str(tmp_path))
    restored.load(7)
    assert names(restored.get_samples(1)) == ["p3"]


def test_without_prompt_data_samples_are_blank() -> None:
    source = RolloutDataSource(Config.of(rollout_global_dataset=False, n_samples_per_prompt=2))
    assert [[sample.prompt for sample in group] for group in source.get_samples(2)] == [["", ""], ["", ""]]


def test_missing_prompt_data_is_explained() -> None:
    with pytest.raises(ConfigError, match="--prompt-data is not set"):
        RolloutDataSource(Config.of())


def test_a_source_without_buffer_refuses_groups(prompts: Path) -> None:
    source = RolloutDataSource(Config.of(prompt_data=str(prompts)))
    with pytest.raises(ConfigError, match="takes no groups back"):
        source.add_samples(source.get_samples(1))

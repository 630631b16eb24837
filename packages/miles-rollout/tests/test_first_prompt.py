import json

import pytest

from miles.core.config import Config
from miles.core.errors import ConfigError
from miles.rewards.dispatch import Dispatcher
from miles.rollout.data_source import RolloutDataSource
from miles.rollout.first_prompt import check_first_prompt


@pytest.fixture
def check(tmp_path):
    def check(metadata, dispatcher=Dispatcher, **flags):
        path = tmp_path / "prompts.jsonl"
        path.write_text(json.dumps({"text": "1+1=", "metadata": metadata}) + "\n")
        config = Config.of(prompt_data=str(path), input_key="text", **flags)
        check_first_prompt(config, RolloutDataSource(config), dispatcher)

    return check


@pytest.mark.parametrize("function", ["sglang", "fully_async"])
def test_a_run_that_nothing_rewards_is_refused(check, function):
    with pytest.raises(ConfigError, match=r"nothing rewards the responses. Give --rm-type"):
        check({"level": 1}, rollout_function_path=function)


@pytest.mark.parametrize(
    "flags",
    [
        {"rm_type": "math"},
        {"custom_rm_path": "json.dumps"},
        {"custom_generate_function_path": "json.dumps"},
        {"rollout_function_path": "json.dumps"},
        {"rollout_function_path": "buffer_service"},
        {"rollout_function_path": "sft"},
    ],
)
def test_what_may_reward_is_trusted(check, flags):
    check({}, **flags)


def test_prompts_may_name_their_reward(check):
    check({"rm_type": "math"})


def test_a_dispatcher_of_ones_own_needs_no_type(check):
    check({}, dispatcher=object)


def test_a_source_without_a_data_set_is_left_alone():
    check_first_prompt(Config.of(rollout_global_dataset=False), object(), Dispatcher)

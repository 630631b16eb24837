import pytest

from miles.rollout.engines.sglang.environment import Argument
from miles.rollout.engines.sglang.options import arguments_of, problems_with


def argument(*flags, type="str", choices=None, several=False, switch=False):
    return Argument(flags, type, choices, several, switch)


ARGUMENTS = [
    argument("--model-path", "--model"),
    argument("--tp-size", "--tensor-parallel-size", type="int"),
    argument("--max-running-requests", type="int"),
    argument("--schedule-conservativeness", type="float"),
    argument("--context-length", type="human_readable_int"),
    argument("--json-model-override-args", type="loads"),
    argument("--schedule-policy", choices=("lpm", "fcfs")),
    argument("--disable-radix-cache", switch=True),
    argument("--lora-target-modules", several=True),
    argument("--custom", type="a_function_of_its_own"),
]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_running_requests", 8),
        ("schedule_conservativeness", 1),
        ("schedule_conservativeness", 0.5),
        ("context_length", 4096),
        ("context_length", "32k"),
        ("json_model_override_args", '{"a": 1}'),
        ("schedule_policy", "fcfs"),
        ("disable_radix_cache", True),
        ("lora_target_modules", ["q_proj", "k_proj"]),
        ("lora_target_modules", "all"),
        ("custom", "anything"),
    ],
)
def test_values_that_the_server_takes(name, value):
    assert problems_with({name: value}, ARGUMENTS) == []


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("max_running_requests", "many", "--sglang-max-running-requests many: expected an integer"),
        ("max_running_requests", 1.5, "--sglang-max-running-requests 1.5: expected an integer"),
        ("max_running_requests", True, "--sglang-max-running-requests : expected an integer"),
        ("max_running_requests", [1, 2], "--sglang-max-running-requests 1 2: expected an integer"),
        ("schedule_conservativeness", "x", "--sglang-schedule-conservativeness x: expected a number"),
        ("context_length", "32 K", "--sglang-context-length 32 K: expected an integer such as 32768 or 32k"),
        ("json_model_override_args", "{", "--sglang-json-model-override-args {: expected JSON"),
        ("schedule_policy", "best", "--sglang-schedule-policy best: expected one of lpm, fcfs"),
        ("disable_radix_cache", 3, "--sglang-disable-radix-cache 3: expected no value"),
    ],
)
def test_values_that_it_does_not_take(name, value, problem):
    assert problems_with({name: value}, ARGUMENTS) == [problem]


def test_a_misspelt_name_is_answered_with_the_nearest():
    (problem,) = problems_with({"max_runing_requests": 8}, ARGUMENTS)
    assert problem.endswith("has no argument --max-runing-requests. Did you mean --sglang-max-running-requests?")
    (problem,) = problems_with({"tp": 2}, ARGUMENTS)
    assert problem.endswith("Did you mean --sglang-tp-size?")
    (problem,) = problems_with({"xyzzy": 2}, ARGUMENTS)
    assert problem.endswith("has no argument --xyzzy")


def test_what_miles_decides_is_refused_by_every_name():
    problems = problems_with({"model": "m", "tensor_parallel_size": 2}, ARGUMENTS)
    assert problems == [
        "--sglang-model is set by Miles: the engines load --hf-checkpoint",
        "--sglang-tensor-parallel-size is set by Miles: give --rollout-num-gpus-per-engine",
    ]


def test_options_as_a_command_line():
    options = {"disable_radix_cache": True, "off": False, "none": None, "names": ["a", 1], "context_length": 7}
    assert arguments_of(options) == ["--disable-radix-cache", "--names", "a", "1", "--context-length", "7"]

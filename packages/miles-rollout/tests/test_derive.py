import pytest

from miles.core.config import Config
from miles.rollout.derive import SFT_ROLLOUT
from miles.rollout.engine_options import engine_options

BATCH = ("--rollout-batch-size", "8")


def resolve(*flags: str) -> Config:
    return Config.from_flags([*BATCH, *flags], check=False)


@pytest.mark.parametrize(
    ("flag", "value", "heir"),
    [
        ("--rollout-temperature", "0.5", "eval_temperature"),
        ("--rollout-top-p", "0.9", "eval_top_p"),
        ("--rollout-top-k", "5", "eval_top_k"),
        ("--rollout-max-response-len", "9", "eval_max_response_len"),
        ("--rollout-max-context-len", "9", "eval_max_context_len"),
        ("--rollout-max-prompt-len", "9", "eval_max_prompt_len"),
        ("--input-key", "question", "eval_input_key"),
        ("--label-key", "answer", "eval_label_key"),
        ("--tool-key", "functions", "eval_tool_key"),
        ("--rollout-function-path", "my.rollout", "eval_function_path"),
    ],
)
def test_evaluation_inherits_from_training(flag, value, heir):
    config = resolve(flag, value)
    assert str(getattr(config, heir)) == value
    assert config.origin[heir] == "inherited"


def test_an_agent_brings_the_sessions_it_talks_to():
    pytest.importorskip("miles.router")
    assert resolve("--custom-agent-function-path", "my.agent").use_session_server
    assert not resolve().use_session_server


def test_a_prompt_leaves_room_for_one_token():
    config = resolve("--rollout-max-context-len", "100")
    assert config.rollout_max_prompt_len == 99
    assert config.eval_max_prompt_len == 99
    assert resolve("--rollout-max-context-len", "100", "--rollout-max-prompt-len", "50").rollout_max_prompt_len == 50


def test_prompts_are_submitted_by_the_rollout_unless_said_otherwise():
    assert resolve().over_sampling_batch_size == 8
    assert resolve("--over-sampling-batch-size", "16").over_sampling_batch_size == 16


def test_fine_tuning_reads_its_responses_and_needs_no_engines():
    config = resolve("--loss-type", "sft_loss")
    assert config.rollout_function_path == SFT_ROLLOUT
    assert config.rollout_num_engines == 0


def test_fine_tuning_that_is_evaluated_needs_engines():
    config = resolve("--loss-type", "sft_loss", "--eval-interval", "5", "--device", "cpu")
    assert config.eval_function_path == "miles.rollout.sglang_rollout.generate_rollout"
    assert config.rollout_num_engines == 1


def test_engines_follow_from_accelerators():
    assert resolve("--rollout-num-gpus", "8", "--rollout-num-gpus-per-engine", "2").rollout_num_engines == 4
    assert resolve("--device", "cuda", "--rollout-num-engines", "3").rollout_num_gpus == 3
    assert resolve("--device", "cpu").rollout_num_engines == 1
    assert resolve("--device", "cpu", "--rollout-num-engines", "2").rollout_num_engines == 2


def test_a_run_on_loaded_samples_needs_no_engines():
    assert resolve("--load-debug-rollout-data", "x_{rollout_id}.pt").rollout_num_engines == 0


def test_the_engine_is_named_when_it_is_left_open():
    assert resolve("--device", "cpu").rollout_engine == "embedded"
    assert resolve("--rollout-engine", "sglang").rollout_engine == "sglang"
    assert resolve("--device", "cpu", "--sglang-python", "/its/python").rollout_engine == "sglang"


def test_an_engine_is_told_what_was_given_and_nothing_else():
    assert engine_options(resolve()) == {}
    given = {
        "--sglang-python": "/its/python",
        "--sglang-mem-fraction-static": "0.9",
        "--sglang-max-running-requests": "7",
    }
    assert engine_options(resolve(*(word for pair in given.items() for word in pair))) == {
        "python": "/its/python",
        "mem_fraction_static": 0.9,
        "max_running_requests": 7,
    }

import pytest

from miles.core.config import Config
from miles.core.errors import ConfigError


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "run.yaml",
            "rollout-batch-size: 4\nlr: 1.0e-5\ndisable_grpo_std_normalization: true\ntrain_env_vars: {A: '1'}\n",
        ),
        (
            "run.toml",
            'rollout_batch_size = 4\nlr = 1e-5\ndisable-grpo-std-normalization = true\ntrain-env-vars = {A = "1"}\n',
        ),
    ],
)
def test_yaml_and_toml_say_the_same(tmp_path, name, text):
    config = Config.from_flags(["--config", write(tmp_path, name, text)], check=False)
    assert config.rollout_batch_size == 4
    assert config.lr == 1e-5
    assert config.grpo_std_normalization is False
    assert config.train_env_vars == {"A": "1"}
    assert config.origin["lr"] == "file"
    assert name in config.reason["lr"]


def test_the_field_name_of_a_negative_flag_is_positive(tmp_path):
    path = write(tmp_path, "run.yaml", "rollout_batch_size: 4\ngrpo_std_normalization: false\n")
    assert Config.from_flags(["--config", path], check=False).grpo_std_normalization is False


def test_the_command_line_wins_over_the_file(tmp_path):
    path = write(tmp_path, "run.yaml", "rollout_batch_size: 4\nlr: 1\ncolocate: true\n")
    config = Config.from_flags(["--lr", "2", "--config", path, "--no-colocate"], check=False)
    assert (config.lr, config.origin["lr"]) == (2.0, "flag")
    assert config.colocate is False


def test_unknown_key_and_wrong_value_name_the_file_and_both_are_reported(tmp_path):
    path = write(tmp_path, "run.yaml", "rollout_batch_size: 4\neps_clip_hihg: 1\nlr: fast\n")
    with pytest.raises(ConfigError) as caught:
        Config.from_flags(["--config", path], check=False)
    unknown, wrong = caught.value.problems
    assert path in unknown
    assert "Did you mean eps-clip-high?" in unknown
    assert path in wrong
    assert "expected a number" in wrong


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.yaml", "a: [1", "not valid yaml"),
        ("run.toml", "a = ", "not valid toml"),
        ("run.yaml", "- 1\n- 2\n", "found a list"),
        ("run.yaml", "1: 2\n", "found a key that is not text"),
        ("run.yaml", "config: other.yaml\n", "give --config on the command line"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(ConfigError, match=message):
        Config.from_flags(["--rollout-batch-size", "4", "--config", path], check=False)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"--config nowhere.yaml: the file cannot be read \(No such file"):
        Config.from_flags(["--rollout-batch-size", "4", "--config", "nowhere.yaml"], check=False)


def test_a_file_that_cannot_be_read_is_the_only_problem():
    _, found = Config.examine(["--config", "nowhere.yaml"])
    assert len(found) == 1


def test_an_empty_file_sets_nothing(tmp_path):
    path = write(tmp_path, "run.yaml", "# nothing\n")
    assert Config.from_flags(["--rollout-batch-size", "4", "--config", path], check=False).lr == 1e-6


def test_values_for_hooks_are_attributes(tmp_path):
    path = write(tmp_path, "mine.yaml", "tool_timeout: 3\nnames: [a, b]\n")
    config = Config.from_flags(["--rollout-batch-size", "4", "--custom-config-path", path], check=False)
    assert config.tool_timeout == 3
    assert config.names == ["a", "b"]
    assert config.custom() == {"tool_timeout": 3, "names": ["a", "b"]}
    assert config.origin["names"] == "custom"


def test_a_value_for_hooks_may_not_hide_a_flag(tmp_path):
    path = write(tmp_path, "mine.yaml", "lr: 3\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: lr is the flag --lr"):
        Config.from_flags(["--rollout-batch-size", "4", "--custom-config-path", path], check=False)


def test_programs_give_values_for_hooks_too():
    config = Config.from_flags(["--rollout-batch-size", "4"], extra_values={"depth": 2}, check=False)
    assert config.depth == 2

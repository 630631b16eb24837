import pytest

from miles.core.config.discover import flag_table
from miles.core.config.flag import FlagSpec


def flag(name: str) -> FlagSpec:
    return flag_table().flags[name]


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("lr", "1e-6", 1e-6),
        ("lr", 1, 1.0),
        ("num_rollout", "12", 12),
        ("num_rollout", "None", None),
        ("loss_type", "sft_loss", "sft_loss"),
        ("use_tis", True, True),
        ("use_tis", "false", False),
        ("train_env_vars", '{"A": "1"}', {"A": "1"}),
        ("train_env_vars", {"A": "1"}, {"A": "1"}),
        ("profile_target", ["train_actor"], ["train_actor"]),
        ("profile_target", "train_actor", ["train_actor"]),
    ],
)
def test_text_and_file_values_become_typed(name, raw, value):
    assert flag(name).parse(raw) == value


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("lr", "fast", "expected a number"),
        ("lr", "-1", "expected at least 0"),
        ("lr", "nan", "expected"),
        ("num_rollout", "1.5", "expected an integer"),
        ("num_rollout", "0", "expected more than 0"),
        ("loss_type", "sft", "expected one of policy_loss, sft_loss, custom_loss"),
        ("use_tis", "perhaps", "expected true or false"),
        ("train_env_vars", "{A: 1", "expected a JSON object"),
        ("train_env_vars", "[1]", "expected a JSON object"),
        ("lr", None, "expected a number"),
        ("eps_clip_c", "1", "expected more than 1"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_expected(name, raw, message):
    with pytest.raises(ValueError, match=message):
        flag(name).parse(raw)


def test_a_negative_flag_has_a_positive_field():
    spec = flag("grpo_std_normalization")
    assert spec.spelling == "--disable-grpo-std-normalization"
    assert spec.default is True


def test_every_flag_has_help_and_a_type():
    for spec in flag_table().flags.values():
        assert spec.help, spec.spelling
        assert spec.help.endswith("."), spec.spelling
        assert spec.type_name, spec.spelling


def test_mutable_defaults_are_not_shared():
    assert flag("train_env_vars").default is not flag("train_env_vars").default

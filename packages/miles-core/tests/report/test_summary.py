import numpy as np
import pytest

from miles.core.report.results import evaluations
from miles.core.report.summary import facts, headline, num_parameters, results
from miles.core.tracking import names
from miles.core.tracking.jsonl import Record, read_records

safetensors = pytest.importorskip("safetensors.numpy")


def test_the_head_says_what_the_run_is(run):
    config = run.read_config()
    assert headline(config) == "GRPO of tiny"
    assert headline({"loss_type": "sft_loss"}) == "Supervised fine-tuning"


def test_parameters_are_counted_from_the_checkpoint(tmp_path):
    safetensors.save_file({"a": np.zeros((3, 4)), "b": np.zeros(5)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    assert num_parameters(tmp_path / "model.safetensors") == 17
    assert headline({"hf_checkpoint": str(tmp_path), "advantage_estimator": "gspo"}) == (
        "GSPO of Qwen3ForCausalLM with 17 parameters"
    )


def test_results_show_the_first_value_and_the_last(run):
    found = results(run.read_config(), list(read_records(run.metrics)), evaluations(run))
    assert "held-out" in found[0]["note"]
    assert found[0]["last"] == "100.0%"
    assert found[0]["first"].endswith("%")


@pytest.mark.parametrize(
    ("config", "note"), [({"rm_type": "math"}, "mean reward in training"), ({"loss_type": "sft_loss"}, "training loss")]
)
def test_a_reward_that_stays_zero_is_shown_where_there_is_one(config, note):
    records = [Record("rollout", step, step, 0.0, {names.REWARD: 0.0, names.LOSS: 1.0}) for step in range(2)]
    (fact,) = results(config, records, [])
    assert note in fact["note"]


def test_facts_leave_out_what_is_not_known(run):
    names = [fact["name"] for fact in facts(run.read_config(), list(read_records(run.metrics)))]
    assert names == ["Model", "Reward", "Rollouts", "Batch", "Learning rate", "Time"]

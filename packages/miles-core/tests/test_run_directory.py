import pytest

from miles.core.errors import ConfigError
from miles.core.run_directory import RunDirectory


def test_save_names_the_directory(tmp_path):
    assert RunDirectory.choose(tmp_path / "mine", "ignored").path == tmp_path / "mine"


def test_generated_directories_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = RunDirectory.choose(None, "Qwen/Qwen3 0.6B").create()
    second = RunDirectory.choose(None, "Qwen/Qwen3 0.6B").create()
    assert first.path != second.path
    assert first.path.parent.name == "runs"
    assert first.path.name.count("/") == 0
    assert "Qwen-Qwen3-0.6B" in first.path.name


def test_directory_that_cannot_be_made_is_a_mistake_of_the_flag(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--save .*file: no run can be kept there"):
        RunDirectory(tmp_path / "file").create()


def test_config_round_trips_with_origins(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.read_config() == {}
    run.write_config({"eps_clip": 0.2, "save": "here"}, {"save": "flag"})
    assert run.read_config() == {"eps_clip": 0.2, "save": "here"}
    assert '"origin": "flag"' in run.config.read_text()


def test_torn_config_is_named(tmp_path):
    run = RunDirectory(tmp_path)
    run.config.write_text('{"lr": {"val')
    with pytest.raises(ConfigError, match=r"config\.json cannot be read.*Remove it"):
        run.read_config()


def test_sample_files_are_found_in_order(tmp_path):
    run = RunDirectory(tmp_path).create()
    for path in (
        run.rollout_samples(10),
        run.rollout_samples(2),
        run.eval_samples(4, "my_data_set"),
        run.rollouts / "x.jsonl",
    ):
        path.write_text("")
    assert list(run.rollout_files()) == [(2, run.rollout_samples(2)), (10, run.rollout_samples(10))]
    assert list(run.eval_files()) == [(4, "my_data_set", run.eval_samples(4, "my_data_set"))]

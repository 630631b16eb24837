import json
import subprocess
import sys
from typing import Annotated

import pytest

from miles.core import cli
from miles.core.cli import main
from miles.core.config import show
from miles.core.config.discover import build_table
from miles.core.config.group import Flag, Group
from miles.core.errors import EngineError
from miles.core.tracking.jsonl import JsonlTracker


def test_help_explains_the_commands(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("train", "train-async", "config", "plugins", "version"):
        assert f"  {command}" in text


def test_no_command_is_a_mistake():
    assert main([]) == 2


def test_an_unknown_command_is_named(capsys):
    assert main(["tarin"]) == 2
    assert "'tarin' is not a command" in capsys.readouterr().err


def test_three_mistakes_are_reported_at_once_without_a_traceback(capsys):
    assert main(["train", "--rollout-batch-size", "4", "--lr", "x", "--eps-clp", "1", "--save-interval", "0"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for text in ("--lr x", "--eps-clp", "--save-interval 0"):
        assert text in error


def test_a_failed_run_tells_why_and_what_caused_it(capsys, monkeypatch):
    def fail(flags):
        raise EngineError("engine 0 has ended") from ValueError("out of memory")

    monkeypatch.setitem(cli._COMMANDS, "train", fail)
    assert main(["train"]) == 1
    error = capsys.readouterr().err
    assert error.endswith("miles train: engine 0 has ended\n")
    assert "ValueError: out of memory" in error


def test_an_interrupted_run_ends_quietly(capsys, monkeypatch):
    def interrupt(flags):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, "train", interrupt)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "miles train: interrupted\n"


def test_train_help_lists_flags(capsys):
    assert main(["train", "--help"]) == 0
    assert "--rollout-batch-size INT" in capsys.readouterr().out


def test_asynchronous_training_takes_the_flags_of_train(capsys):
    assert main(["train-async", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: miles train-async [FLAG ...]")
    assert main(["train-async", "--rollout-batch-size", "4", "--colocate"]) == 2
    assert "--colocate lets trainer and engines take turns" in capsys.readouterr().err


def test_config_shows_values_and_origins(capsys):
    main(["config", "--rollout-batch-size", "4", "--eps-clip", "0.3"])
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("eps_clip_high")]
    assert line.split() == ["eps_clip_high", "0.3", "inherited", "from", "--eps-clip"]


def test_config_writes_json(capsys):
    main(["config", "--json", "--rollout-batch-size", "4"])
    assert json.loads(capsys.readouterr().out)["rollout_batch_size"]["origin"] == "flag"


def test_config_shows_problems_after_the_values(capsys):
    assert main(["config", "--rollout-batch-size", "4", "--lr", "x"]) == 2
    captured = capsys.readouterr()
    assert "rollout_batch_size" in captured.out
    assert "--lr x" in captured.err


def test_explain_tells_value_and_reason(capsys):
    assert main(["config", "--explain", "eps-clip-high", "--eps-clip", "0.4"]) == 0
    assert "0.4 (inherited: from --eps-clip)" in capsys.readouterr().out


def test_explain_takes_the_flag_as_it_is_typed(capsys):
    assert main(["config", "--explain", "--eps-clip", "--eps-clip", "0.4"]) == 0
    assert "0.4 (flag" in capsys.readouterr().out
    assert main(["config", "--explain"]) == 2


def test_explain_of_a_misspelled_flag_names_the_nearest(capsys):
    assert main(["config", "--explain", "eps-clip-hihg"]) == 2
    assert "--eps-clip-high" in capsys.readouterr().err


def test_unsupported_flags_are_listed_with_reasons(capsys, monkeypatch):
    class Planned(Group):
        title = "Planned"

        half_done: Annotated[int | None, Flag(unsupported="the other half is missing")] = None
        """A number."""

    monkeypatch.setattr(show, "flag_table", lambda: build_table([("acme", (Planned,))]))
    assert main(["config", "--unsupported"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split(maxsplit=1) == ["--half-done", "the other half is missing"]


def test_where_every_flag_works_nothing_is_listed(capsys, monkeypatch):
    monkeypatch.setattr(show, "unsupported", list)
    assert main(["config", "--unsupported"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("0 of ")


def test_schema_is_json(capsys):
    assert main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["type"] == "object"


def test_reference_goes_to_a_file(tmp_path):
    target = tmp_path / "docs" / "cli.md"
    assert main(["config", "--reference", str(target)]) == 0
    assert target.read_text().startswith("# Command line")


def test_plugins_and_versions_are_listed(capsys):
    assert main(["plugins"]) == 0
    assert "miles.config" in capsys.readouterr().out
    assert main(["version"]) == 0
    assert "miles-core" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["plugins"]])
def test_a_reader_that_leaves_early_is_no_error(arguments):
    code = "import sys; from miles.core.cli import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


def test_a_run_whose_reader_leaves_is_no_success():
    code = """
import sys
from miles.core import cli
def train(flags):
    while True:
        print("rollout", flush=True)
cli._COMMANDS["train"] = train
sys.exit(cli.main(["train"]))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"rollout\n"
        process.stdout.close()
        assert b"BrokenPipeError" in process.stderr.read()
    assert process.returncode == 1


@pytest.mark.parametrize("command", ["plugins", "version"])
def test_a_command_without_flags_refuses_flags(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([command, "--verbose"])
    assert "--verbose" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"usage: miles {command}" in capsys.readouterr().out


def test_a_refused_connection_is_told_without_a_traceback(capsys, monkeypatch):
    def fail(flags):
        raise EngineError("engine 0 got no answer") from ConnectionRefusedError()

    monkeypatch.setitem(cli._COMMANDS, "train", fail)
    assert main(["train"]) == 1
    assert capsys.readouterr().err == "miles train: engine 0 got no answer\n"


def test_report_of_a_directory_without_metrics_says_so(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "no metrics there" in capsys.readouterr().err


def test_report_writes_the_page(tmp_path, capsys):
    tracker = JsonlTracker(None, tmp_path)
    tracker.log({"train/loss": 0.5}, step=0, kind="train", rollout_id=0)
    tracker.close()
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").is_file()


def test_a_run_without_its_batch_sizes_is_refused_without_a_traceback(capsys):
    assert main(["train", "--num-rollout", "2"]) == 2
    assert "--rollout-batch-size is required" in capsys.readouterr().err


def test_modules_of_the_working_directory_can_be_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "of_my_own.py").write_text("def reward(args, sample):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    main(["config", "--custom-rm-path", "of_my_own.reward", "--custom-generate-function-path", "not_there.generate"])
    said = capsys.readouterr()
    assert "'not_there' on the Python path" in said.err
    assert "of_my_own" not in said.err
    assert sys.path[-1] == str(tmp_path)

from pathlib import Path

import pytest
import stage
from stage import Stage


def test_flags_become_a_command_line():
    flags = {"lr": 4e-3, "rollout-shuffle": True, "eval-prompt-data": ("sums", Path("eval.jsonl"))}
    expected = "miles train --save out --num-rollout 3 --lr 0.004 --rollout-shuffle --eval-prompt-data sums eval.jsonl"
    assert " ".join(Stage(Path("out"), 3, flags).command()) == expected


def test_a_stage_is_finished_with_the_checkpoint_of_its_last_rollout(tmp_path):
    one = Stage(tmp_path, 3, {})
    assert not one.finished()
    latest = tmp_path / "latest_checkpointed_iteration.txt"
    latest.write_text("1")
    assert not one.finished()
    latest.write_text("2")
    assert one.finished()


def test_a_finished_stage_is_not_run_again(tmp_path, monkeypatch, capsys):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    monkeypatch.setattr(stage.subprocess, "run", pytest.fail)
    Stage(tmp_path, 3, {}).run()
    assert "Already done" in capsys.readouterr().out


def test_a_failed_run_ends_the_recipe_and_says_how_to_go_on(tmp_path, monkeypatch):
    command = tmp_path / "miles"
    command.write_text("#!/bin/sh\nexit 3\n")
    command.chmod(0o755)
    monkeypatch.setattr(stage, "miles_command", lambda: command)
    with pytest.raises(SystemExit, match=r"status 3\. The same command continues it"):
        Stage(tmp_path / "run", 3, {}).run()

import json
import subprocess
import sys

import pytest

from miles.rewards.cli import main


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = [
    {"response": r"\boxed{42}", "label": "42", "known": 1},
    {"response": r"\boxed{41}", "label": "42", "known": 1},
    {"response": "none \ud800", "label": "42", "known": False},
]


def test_a_file_is_graded_and_compared(tmp_path, capsys):
    assert main(["grade", "--type", "math", "--input", write(tmp_path / "in", ROWS), "--expected", "known"]) == 0
    printed = capsys.readouterr().out
    assert "3 rows" in printed
    assert "mean reward 0.3333" in printed
    assert "agreement: 2 of 3" in printed
    assert "line 2: 0 (wrong)  label 42" in printed
    assert "slowest:" in printed


def test_outcomes_are_written(tmp_path):
    output = tmp_path / "out"
    main(["grade", "--type", "dapo", "--input", write(tmp_path / "in", ROWS), "--output", str(output)])
    outcomes = [json.loads(line)["outcome"] for line in output.read_text().splitlines()]
    assert [outcome["category"] for outcome in outcomes] == ["no_answer"] * 3
    assert outcomes[0]["score"] == {"score": -1.0, "acc": False, "pred": "[INVALID]"}


def test_other_columns(tmp_path, capsys):
    path = write(tmp_path / "in", [{"text": r"\boxed{1}", "gold": 1}])
    main(["grade", "--type", "math", "--input", path, "--response-key", "text", "--label-key", "gold"])
    assert "mean reward 1.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "line 1: a list where an object is expected"),
        ('{"label": 1}', "line 1: no column 'response'; it has 'label'"),
        ('{"response": 1}', "line 1: 'response' is 1; it must be text"),
        ('{"response": "x"}\n\n{"response": "x", "metadata": 3}', "line 3: 'metadata' is a int"),
        ('{"response": "caf\xe9"}', "line 1: not UTF-8"),
        ("[" * 100_000, "line 1: not JSON"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, capsys, content, message):
    path = tmp_path / "in"
    path.write_bytes(content.encode("latin-1"))
    assert main(["grade", "--type", "math", "--input", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_file_and_an_unknown_type_are_named(tmp_path, capsys):
    assert main(["grade", "--type", "math", "--input", str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["grade", "--type", "mth", "--input", write(tmp_path / "in", ROWS)]) == 2
    assert "Did you mean 'math'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("human", "line 1: 'human' is 'yes'; a reward is a number"),
        ("humn", "no row has a column 'humn'"),
    ],
)
def test_a_column_without_rewards_is_named(tmp_path, capsys, column, message):
    path = write(tmp_path / "in", [{"response": "x", "label": 1, "human": "yes"}])
    assert main(["grade", "--type", "math", "--input", path, "--expected", column]) == 2
    assert message in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_named_before_grading(tmp_path, capsys):
    path = write(tmp_path / "in", ROWS)
    assert main(["grade", "--type", "math", "--input", path, "--output", str(tmp_path / "no" / "out")]) == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["acc_", "pred"])
def test_a_reward_key_that_names_no_number_is_named(tmp_path, capsys, key):
    path = write(tmp_path / "in", ROWS)
    assert main(["grade", "--type", "dapo", "--input", path, "--reward-key", key]) == 2
    error = capsys.readouterr().err
    assert f"--reward-key is {key!r}, which names no number" in error
    assert "'score': -1.0, 'acc': False, 'pred': '[INVALID]'" in error


def test_the_spellings_of_a_run_are_accepted(tmp_path, capsys):
    path = write(tmp_path / "in", ROWS)
    assert main(["grade", "--rm-type", "remote_rm", "--input", path]) == 2
    assert "needs --rm-url" in capsys.readouterr().err
    assert main(["grade", "--rm-type", "remote_rm", "--rm-url", "host", "--input", path]) == 2
    assert "--rm-url 'host': expected an address" in capsys.readouterr().err


def test_the_first_failure_of_a_kind_says_why(tmp_path, capsys):
    for row, why in (({"label": None}, "bad label"), ({}, "no column 'label'; --label-key names the column")):
        main(["grade", "--type", "math", "--input", write(tmp_path / "in", [ROWS[0], {"response": "x"} | row])])
        assert f"50.0%  first in line 2: {why}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--workers", "0"], ["--timeout", "-1"], ["--list", "x"]])
def test_impossible_numbers_are_refused(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit):
        main(["grade", "--type", "math", "--input", "in", *arguments])
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(("port", "said"), [("99999", "99999 is not between 0 and 65535"), ("x", "invalid int value")])
def test_a_port_that_is_none_is_refused(capsys, port, said):
    with pytest.raises(SystemExit):
        main(["serve", "--type", "math", "--port", port])
    assert said in capsys.readouterr().err


def test_an_empty_file(tmp_path, capsys):
    assert main(["grade", "--type", "math", "--input", write(tmp_path / "in", [])]) == 0
    assert capsys.readouterr().out == "no rows\n"


def test_types_are_listed(capsys):
    assert main(["types"]) == 0
    assert "remote_rm" in capsys.readouterr().out


def test_a_reader_that_goes_is_no_error():
    code = "import sys; from miles.rewards.cli import main; sys.exit(main(['types']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0

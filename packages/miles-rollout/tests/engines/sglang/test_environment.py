import json
import sys

import pytest

from miles.core.errors import ConfigError
from miles.rollout.engines.sglang import environment
from miles.rollout.engines.sglang.environment import Environment

TABLE = {
    "version": "9.9",
    "arguments": [{"flags": ["--tp-size"], "type": "int", "choices": None, "several": False, "switch": False}],
}


@pytest.fixture
def interpreter(tmp_path, monkeypatch):
    """An interpreter that has SGLang 9.9, and counts how often it is asked for arguments."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MILES_SGLANG_PYTHON", raising=False)
    (tmp_path / "table.json").write_text(json.dumps(TABLE))
    python = tmp_path / "python"
    asked = tmp_path / "asked"
    python.write_text(
        f'#!/bin/sh\ncase "$2" in *version*) echo 9.9;; *) echo x >> {asked}; cat {tmp_path / "table.json"};; esac\n'
    )
    python.chmod(0o755)
    return python


def test_the_arguments_are_asked_for_once(interpreter, tmp_path):
    for _ in range(2):
        (argument,) = Environment(interpreter).arguments()
        assert (argument.flags, argument.type) == (("--tp-size",), "int")
    assert (tmp_path / "asked").read_text() == "x\n"


def test_an_environment_with_sglang_is_usable(interpreter):
    found = Environment.of({"python": str(interpreter)})
    assert (found.problem(), found.version()) == (None, "9.9")


def test_the_interpreter_is_the_flags_then_the_variables_then_the_own(interpreter, monkeypatch):
    assert str(Environment.of({}).python) == sys.executable
    monkeypatch.setenv("MILES_SGLANG_PYTHON", "/from/variable")
    assert str(Environment.of({}).python) == "/from/variable"
    assert Environment.of({"python": str(interpreter)}).python == interpreter


def test_an_interpreter_that_is_not_there_is_named(interpreter):
    assert Environment.of({"python": "/nowhere/python"}).problem() == (
        "--sglang-python /nowhere/python: there is no such interpreter. Expected the python of an environment with "
        "SGLang"
    )


def test_an_environment_without_sglang_says_what_to_do(tmp_path, interpreter):
    python = tmp_path / "bare"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    problem = Environment(python).problem()
    assert f"--sglang-python {python}: SGLang is not installed" in problem
    assert environment.INSTALL in problem


def test_an_sglang_that_cannot_be_imported_says_why(interpreter):
    interpreter.write_text("#!/bin/sh\ncase \"$2\" in *version*) echo 9.9;; *) echo 'no torch' >&2; exit 1;; esac\n")
    with pytest.raises(ConfigError, match=r"(?s)cannot be imported.*no torch"):
        Environment(interpreter).arguments()

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles.core.errors import ConfigError, PluginError
from miles.rollout.tools.specs import load_tool_specs

SPECS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def test_json_yaml_and_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tools.json").write_text(json.dumps(SPECS))
    (tmp_path / "tools.yaml").write_text(
        "- {type: function, function: {name: add, parameters: {type: object, properties: {}}}}"
    )
    (tmp_path / "my_tools.py").write_text(f"SPECS = {SPECS!r}")
    monkeypatch.syspath_prepend(tmp_path)
    for path in (str(tmp_path / "tools.json"), str(tmp_path / "tools.yaml"), "my_tools.SPECS", "my_tools:SPECS"):
        assert load_tool_specs(path) == SPECS


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.json", "[", "not JSON"),
        ("a.yaml", "a: [", "not YAML"),
        ("a.json", "{}", "expected a list"),
        ("a.json", "[]", "expected a list"),
        ("a.json", '[{"type": "function"}]', "definition 1 has no name"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, name: str, text: str, problem: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=problem):
        load_tool_specs(str(tmp_path / name))


def test_a_missing_file_and_a_missing_object(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_tool_specs(str(tmp_path / "no.json"))
    with pytest.raises(PluginError, match="no module"):
        load_tool_specs("no_such_module.SPECS")

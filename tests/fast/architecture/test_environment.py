"""Environment variables are read in ``miles/core/environ.py`` alone."""

from __future__ import annotations

import ast

_IN_SGLANG = "miles.rollout.engines.sglang.server.miles_sglang"
# What these modules do with the environment is pass it on, or run before Miles can be imported, or where it is not.
ALLOWED = {"miles.core.environ", "miles.core.child", f"{_IN_SGLANG}.changes", f"{_IN_SGLANG}.serve"}
NAMES = {"environ", "getenv", "putenv", "unsetenv", "environb"}


def test_nothing_else_reads_the_environment(sources):
    wrong = []
    for source in sources:
        if source.module in ALLOWED:
            continue
        for node in source.nodes:
            attribute = isinstance(node, ast.Attribute) and node.attr in NAMES
            if attribute and isinstance(node.value, ast.Name) and node.value.id == "os":
                wrong.append(f"{source.path}:{node.lineno}")
            if isinstance(node, ast.ImportFrom) and node.module == "os" and NAMES & {item.name for item in node.names}:
                wrong.append(f"{source.path}:{node.lineno}")
    assert not wrong, "add a function to miles.core.environ, or take a flag"

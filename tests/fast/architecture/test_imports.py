"""Dependencies point one way, and what one name means is the same everywhere."""

from __future__ import annotations

import ast
import re
import sys

PACKAGES = ("core", "router", "rollout", "rewards", "fsdp", "megatron")
GATEWAYS = {
    "miles.core.cli",  # the command answers without torch
    "miles.core.driver.executor",  # Ray
    "miles.core.tracking.console",  # rich
    "miles.fsdp.backend",  # torch, for a light plugin
    "miles.megatron.backend",  # torch and Megatron-Core
    "miles.megatron.convert",  # the same, for a command's help
    "miles.megatron.cpu",  # after Megatron-Core was adapted
    "miles.megatron.recipe",  # Megatron-Core, for a light plugin
    "miles.rewards.cli",  # uvicorn
    "miles.rewards.types.ifbench",  # libraries of an extra
    "miles.rollout.engines.embedded.model",  # one of two models
    "miles.rollout.engines.sglang.server.miles_sglang.serve_cpu",  # SGLang's environment has nothing else of ours
    "miles.router.extras",  # libraries of an extra
}
VAGUE = {"utils", "util", "misc", "common", "helpers", "helper", "base"}


def test_packages_import_core_and_themselves_only(sources):
    wrong = [
        f"{source.path}:{line}: {name}"
        for source in sources
        for line, name in source.imports()
        if (match := re.match(r"miles\.(\w+)", name)) and match[1] not in ("core", source.package)
    ]
    assert not wrong, "siblings meet in miles.core, by protocol and registry"


def test_core_imports_no_other_package(sources):
    wrong = [
        f"{source.path}:{line}: {name}"
        for source in sources
        if source.package == "core"
        for line, name in source.imports()
        if name.startswith("miles.") and not name.startswith("miles.core")
    ]
    assert not wrong


def test_only_the_driver_knows_ray(sources):
    wrong = [
        f"{source.path}:{line}"
        for source in sources
        if not source.module.startswith("miles.core.driver")
        for line, name in source.imports()
        if name.split(".")[0] == "ray"
    ]
    assert not wrong


def test_imports_are_absolute(sources):
    wrong = [
        f"{source.path}:{node.lineno}"
        for source in sources
        for node in source.nodes
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not wrong


def test_own_modules_are_imported_late_only_where_that_is_the_point(sources):
    """Gateways: what lies behind them is heavy, or wants a library that need not be installed."""
    found = {
        source.module
        for source in sources
        for line, name in source.late_imports()
        if name.startswith(("miles.", "miles_sglang"))
    }
    assert found <= GATEWAYS, "import at the top of the file, or say here why not"


def test_nothing_of_the_standard_library_is_imported_late(sources):
    wrong = [
        f"{source.path}:{line}: {name}"
        for source in sources
        for line, name in source.late_imports()
        if name.split(".")[0] in sys.stdlib_module_names
    ]
    assert not wrong


def test_every_module_says_what_it_is(sources):
    assert not [str(source.path) for source in sources if not ast.get_docstring(source.tree)]


def test_the_namespace_belongs_to_nobody(sources):
    assert not [source.path for source in sources if source.path.parts[-2:] == ("miles", "__init__.py")]


def test_every_package_is_marked_as_typed(sources):
    homes = {source.path.parent for source in sources if source.module in {f"miles.{name}" for name in PACKAGES}}
    assert len(homes) == len(PACKAGES)
    assert all((home / "py.typed").is_file() for home in homes)


def test_no_module_has_a_vague_name(sources):
    assert not [source.module for source in sources if VAGUE & set(source.module.split("."))]

"""Dependencies point one way, and what one name means is the same everywhere."""

from __future__ import annotations

import ast
import re

PACKAGES = ("core", "router", "rollout", "rewards", "fsdp", "megatron")
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


def test_the_namespace_belongs_to_nobody(sources):
    assert not [source.path for source in sources if source.path.parts[-2:] == ("miles", "__init__.py")]


def test_every_package_is_marked_as_typed(sources):
    homes = {source.path.parent for source in sources if source.module in {f"miles.{name}" for name in PACKAGES}}
    assert len(homes) == len(PACKAGES)
    assert all((home / "py.typed").is_file() for home in homes)


def test_no_module_has_a_vague_name(sources):
    assert not [source.module for source in sources if VAGUE & set(source.module.split("."))]

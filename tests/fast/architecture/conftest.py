"""The source files of the packages."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = ("core", "router", "rollout", "rewards", "fsdp", "megatron")


@dataclass(frozen=True)
class Source:
    """One module of a package."""

    path: Path

    @property
    def package(self) -> str:
        """``core``, ``router`` ..."""
        return self.path.relative_to(ROOT / "packages").parts[0].removeprefix("miles-")

    @property
    def module(self) -> str:
        """Dotted name."""
        parts = self.path.relative_to(ROOT / "packages" / f"miles-{self.package}" / "src").with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"))

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """All of the tree."""
        return tuple(ast.walk(self.tree))

    def imports(self) -> Iterator[tuple[int, str]]:
        """Line and dotted name of everything imported, wherever in the file."""
        return _imported(self.nodes)

    def late_imports(self) -> Iterator[tuple[int, str]]:
        """The same of what is imported when a function is called."""
        functions = (node for node in self.nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        return _imported(node for function in functions for node in ast.walk(function))


def _imported(nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str]]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.fixture(scope="session")
def sources() -> list[Source]:
    """Every module under ``packages/*/src``."""
    return [Source(path) for path in sorted(ROOT.glob("packages/*/src/**/*.py"))]

"""A flag that is accepted is read somewhere; one that is not read is refused when set."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from miles.core.config.discover import flag_table
from miles.core.plugins import OWN_DISTRIBUTIONS

ROOT = Path(__file__).parents[2]
ABOUT_FLAGS = re.compile(r"/flags(/|\.py)|/core/config/|/core/report/|/(derive|rules|cli)\.py")

# Flags that only shape other flags: reading them elsewhere would repeat the derivation.
CONSUMED_BY_RESOLUTION = {
    "config": "the file it names is read before anything else",
    "custom_config_path": "the values it names become attributes",
    "dump_details": "sets save_debug_rollout_data",
    "debug_train_only": "sets rollout_num_engines to 0",
    "num_gpus_per_node": "bounds actor_num_gpus_per_node",
    "colocate": "sets rollout_num_gpus and lets trainer and engines name the same accelerators",
    "use_miles_router": "runs start this router in any case",
    "enable_weights_backuper": "what keeps copies of weights in host memory is refused without it",
    "warmup_ratio": "another name of lr_warmup_fraction, which it sets",
}

# Groups whose fields another library defines and reads.
FORWARDED_GROUPS = {"TransformerFlags": "every field that is set goes to Megatron-Core under its own name"}


@cache
def names_read() -> frozenset[str]:
    """What the packages read as an attribute (calls aside) or name in a string, outside the modules about flags."""
    found: set[str] = set()
    for path in ROOT.glob("packages/*/src/**/*.py"):
        if not ABOUT_FLAGS.search(path.as_posix()):
            found |= _read(ast.parse(path.read_text(encoding="utf-8")))
    return frozenset(found)


def _read(tree: ast.Module) -> set[str]:
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in called
    }
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return attributes | strings


def accepted() -> list[str]:
    own = [spec for spec in flag_table().flags.values() if spec.distribution in OWN_DISTRIBUTIONS]
    own = [spec for spec in own if spec.group.__name__ not in FORWARDED_GROUPS]
    return [spec.name for spec in own if spec.flag.unsupported is None]


def test_an_accepted_flag_is_read():
    unread = [name for name in accepted() if name not in names_read() and name not in CONSUMED_BY_RESOLUTION]
    assert not unread, "no module reads these: implement them, or mark them Flag(unsupported='why')"


def test_flags_that_are_consumed_by_resolution_exist():
    assert set(CONSUMED_BY_RESOLUTION) <= set(flag_table().flags)


def test_groups_that_are_forwarded_are_read_as_a_whole():
    assert set(FORWARDED_GROUPS) <= names_used()


def names_used() -> set[str]:
    """Names that occur in the packages outside the modules about flags."""
    sources = (p for p in ROOT.glob("packages/*/src/**/*.py") if not ABOUT_FLAGS.search(p.as_posix()))
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in sources)
    return {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}

"""Instructions whose following a program can check: the 58 of IFBench and the 25 of IFEval.

``CHECKS`` maps an instruction's id to a function ``(response, **arguments) -> bool``.  Arguments have the benchmarks'
names.  Needs ``miles-rewards[ifbench]``; nothing is downloaded.
"""

from __future__ import annotations

from miles.rewards.instructions import (
    counting,
    ifeval_content,
    ifeval_format,
    ifeval_language,
    layout,
    repeating,
    sentences,
    tasks,
    wording,
)
from miles.rewards.instructions.check import Check

_MODULES = (counting, layout, repeating, sentences, tasks, wording, ifeval_content, ifeval_format, ifeval_language)

CHECKS: dict[str, Check] = {name: check for module in _MODULES for name, check in module.CHECKS.items()}

"""Property tests draw the same examples in every run, so that a failure belongs to the change that shows it.

`hatch run properties` draws others, and more of them. No example has a deadline and no strategy is too slow: on a busy
machine either says nothing about the code.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

_ON_A_BUSY_MACHINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

settings.register_profile("repeatable", _ON_A_BUSY_MACHINE, derandomize=True)
settings.register_profile("explore", _ON_A_BUSY_MACHINE, max_examples=500, print_blob=True)
settings.load_profile("repeatable")

"""Property tests draw the same examples in every run, so that a failure belongs to the change that shows it.

`hatch run properties` draws others, and more of them.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", max_examples=500, print_blob=True)
settings.load_profile("repeatable")

"""Equality of mathematical answers: the classical contract of MATH (arXiv:2103.03874) and PRM800K (arXiv:2305.20050).

Everything here reads untrusted text.  Nothing is evaluated as code, and every step is bounded in time and memory.
"""

from miles.rewards.math.boxed import last_boxed
from miles.rewards.math.equal import equal

__all__ = ["equal", "last_boxed"]

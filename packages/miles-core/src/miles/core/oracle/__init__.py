"""The loss mathematics a second time: plain NumPy in float64, one equation per function, one sample at a time.

Nothing here is fast, is used in training, or shares code with ``miles.core.math`` and ``miles.core.advantages``.
It says what the fast code must compute, and property tests compare the two.
"""

"""Graders for model answers, in a killable process pool."""

__version__ = "0.1.0"

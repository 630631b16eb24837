"""Prompt data, engines, generation and evaluation for Miles."""

__version__ = "0.1.0"

"""Streaming HTTP router in front of SGLang-compatible engines."""

__version__ = "0.1.0"

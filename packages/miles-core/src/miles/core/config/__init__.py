"""Configuration: flags outside, typed and frozen groups inside."""

from miles.core.config.config import Config
from miles.core.config.group import DERIVED, Flag, Group

__all__ = ["DERIVED", "Config", "Flag", "Group"]

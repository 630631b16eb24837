"""Prompt data: files, rows, prompts, and the order in which they are drawn."""

from miles.rollout.data.dataset import PromptDataset, open_dataset
from miles.rollout.data.files import DataPath, Rows, open_rows, parse_paths
from miles.rollout.data.prompts import Prompt, PromptFormat

__all__ = [
    "DataPath",
    "Prompt",
    "PromptDataset",
    "PromptFormat",
    "Rows",
    "open_dataset",
    "open_rows",
    "parse_paths",
]

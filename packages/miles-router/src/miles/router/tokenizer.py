"""The tokenizer of a checkpoint: ``tokenizer.json``, without transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from miles.core.errors import ConfigError

_CONTEXT_TOKENS = 8  # enough for a character of several byte tokens, and a space


class CheckpointTokenizer:
    """Encodes and decodes as the checkpoint in ``directory`` does.  Raises ConfigError when it has no tokenizer."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._tokenizer = _read_tokenizer(directory)
        self.settings = _read_settings(directory)
        """Content of ``tokenizer_config.json``."""
        specials = {
            i: token.content for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self.special_ids = frozenset(specials)
        """Ids that text around them is never merged with, and that ordinary text does not contain."""
        longest_first = sorted(map(re.escape, specials.values()), key=len, reverse=True)
        self._special_text = re.compile("|".join(longest_first) or "(?!)")

    def encode(self, text: str, *, whole: bool = False) -> list[int]:
        """Token ids of ``text`` as it stands; with ``whole``, with the ids that the tokenizer puts around a prompt."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=whole).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens included."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """What ``ids`` add to the text of ``before``.  Some tokenizers write a word's space only after another word."""
        context = list(before[-_CONTEXT_TOKENS:])
        start = self.decode(context)
        whole = self.decode([*context, *ids])
        return whole[len(start) :] if whole.startswith(start) else self.decode(ids)

    def without_specials(self, text: str) -> str:
        """``text`` less the special tokens written out in it."""
        return self._special_text.sub("", text)


def _read_tokenizer(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.exists():
        found = sorted(file.name for file in directory.iterdir()) if directory.is_dir() else "no such directory"
        raise ConfigError(f"--tokenizer {directory}: expected a tokenizer.json in it ({found})")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise ConfigError(f"--tokenizer {directory}: tokenizer.json cannot be read: {error}") from error


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ConfigError(f"--tokenizer {directory}: tokenizer_config.json is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"--tokenizer {directory}: tokenizer_config.json must be a JSON object")
    return settings

"""The tokenizer, as this package uses it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer

from miles.core.errors import ConfigError
from miles.rollout.data.prompts import Messages

_ENCODED_PROMPTS = 4096
"""Prompts whose token ids are remembered: the samples of a group ask for the same one."""


class ChatTokenizer:
    """Encodes, renders and takes apart text; ``hf`` is the tokenizer of transformers for everything else."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self._pieces: dict[int, str] = {}
        self._encode = lru_cache(maxsize=_ENCODED_PROMPTS)(self._encode_tuple)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` as it stands: no special tokens are added."""
        return list(self._encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of many texts at once."""
        if not texts:
            return []
        return [
            list(ids)
            for ids in self.hf(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
        ]

    def render(
        self,
        messages: Messages,
        *,
        tools: list[Any] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> str:
        """The chat template's text; ValueError when the tokenizer has no template or the template refuses."""
        try:
            text: str = self.hf.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **template_kwargs
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error
        return text

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Text of each token on its own."""
        known = self._pieces
        for token_id in {*token_ids}.difference(known):
            known[token_id] = self.hf.decode([token_id])
        return list(map(known.__getitem__, token_ids))

    def _encode_tuple(self, text: str) -> tuple[int, ...]:
        return tuple(self.hf.encode(text, add_special_tokens=False))


@lru_cache(maxsize=4)
def load_tokenizer(path: str) -> ChatTokenizer:
    """The tokenizer in the directory (or hub name) ``path``; ConfigError when there is none."""
    try:
        return ChatTokenizer(AutoTokenizer.from_pretrained(path, trust_remote_code=True))
    except (OSError, ValueError) as error:
        found = sorted(file.name for file in Path(path).iterdir()) if Path(path).is_dir() else "no such directory"
        raise ConfigError(f"--hf-checkpoint {path}: no tokenizer can be loaded from it ({found}): {error}") from error

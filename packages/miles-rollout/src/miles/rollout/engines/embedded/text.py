"""The tokenizer: loaded when text is first needed."""

from __future__ import annotations

import json
import threading
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from miles.rollout.engines.embedded.protocol import BadRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Text:
    """Encodes, decodes and renders chats for one checkpoint."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()

    @cached_property
    def available(self) -> bool:
        """Whether the checkpoint comes with a tokenizer that decodes without transformers."""
        return (self._directory / "tokenizer.json").exists()

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        if not self.available:
            raise BadRequest(f"{self._directory} has no tokenizer.json: send input_ids, and stop_token_ids to stop")
        return Tokenizer.from_file(str(self._directory / "tokenizer.json"))

    @cached_property
    def _template(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer  # seconds to import, and only chats need it

        return AutoTokenizer.from_pretrained(self._directory)

    @cached_property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end-of-text id."""
        settings = self._directory / "tokenizer_config.json"
        if not self.available or not settings.exists():
            return None
        token = json.loads(settings.read_text()).get("eos_token")
        name = token.get("content") if isinstance(token, dict) else token
        return None if name is None else self._tokenizer.token_to_id(name)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer adds."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        """Text of tokens."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    def chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, options: dict[str, Any]
    ) -> list[int]:
        """Token ids of a conversation with the checkpoint's chat template, ready for the answer."""
        with self._lock:
            if not self._template.chat_template:
                raise BadRequest(f"{self._directory} has no chat template: use /generate")
            rendered: str = self._template.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=False, **options
            )
            ids: list[int] = self._template.encode(rendered, add_special_tokens=False)
            return ids


class StopMatcher:
    """Finds the first stop string in a growing output, looking only where a new one can end."""

    def __init__(self, text: Text, stops: tuple[str, ...], skip_special_tokens: bool) -> None:
        self._text = text
        self._stops = stops
        self._skip_special_tokens = skip_special_tokens
        # A token is at least one byte; special tokens that are skipped may lie between.
        self._window = 2 * max(len(stop.encode()) for stop in stops) + 16

    def __call__(self, tokens: list[int]) -> str | None:
        tail = self._text.decode(tokens[-self._window :], self._skip_special_tokens)
        return next((stop for stop in self._stops if stop in tail), None)


def visible(text: str, finish: dict[str, Any] | None, no_stop_trim: bool) -> str:
    """``text`` up to the stop string that ended it."""
    matched = (finish or {}).get("matched")
    if not isinstance(matched, str) or no_stop_trim:
        return text
    position = text.find(matched)
    return text if position < 0 else text[:position]

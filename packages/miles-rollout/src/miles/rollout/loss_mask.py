"""Which tokens of a conversation an assistant wrote: those train under SFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from miles.rollout.data.prompts import Messages
from miles.rollout.text import ChatTokenizer

MaskType = Literal["qwen", "qwen3", "distill_qwen"]

_DUMMY: dict[str, Any] = {"role": "user", "content": "?"}


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a conversation's text, and whether it trains."""

    text: str
    trains: bool


class LossMasks:
    """Token ids and loss mask of conversations, message by message as the chat template writes them.

    ``qwen`` templates every message on its own.  ``qwen3`` templates it beside a user message, whose text is cut off
    again, because the template treats the last message specially.  ``distill_qwen`` trains the last message's content
    alone, after the first message's prompt; it is taken for tokenizers that know ``<｜Assistant｜>``.
    """

    def __init__(self, tokenizer: ChatTokenizer, kind: MaskType) -> None:
        self._tokenizer = tokenizer
        if kind == "qwen" and "<｜Assistant｜>" in tokenizer.hf.get_added_vocab():
            kind = "distill_qwen"
        kinds: dict[MaskType, Callable[[Messages, list[Any] | None], list[Segment]]] = {
            "qwen": self._qwen,
            "qwen3": self._qwen3,
            "distill_qwen": self._distill_qwen,
        }
        self._segments = kinds[kind]
        if kind == "distill_qwen":
            return
        # What the template puts before the first message of its own accord, and before an assistant's words.
        one, two = self._render([_DUMMY]), self._render([_DUMMY, _DUMMY])
        self._system = one[: len(one) - (len(two) - len(one))]
        self._user_turn = one[len(self._system) :]
        prompted = tokenizer.render([_DUMMY], add_generation_prompt=True)
        self._generation_prompt = prompted[len(one) :]

    def __call__(self, conversations: list[tuple[Messages, list[Any] | None]]) -> list[tuple[list[int], list[int]]]:
        """Token ids and a mask of the same length for each ``(messages, tools)``; 1 = an assistant wrote it.

        A message with ``step_loss_mask`` other than 1 does not train.  ValueError: the template cannot be taken apart.
        """
        segments = [_merged(self._segments(messages, tools)) for messages, tools in conversations]
        encoded = iter(self._tokenizer.encode_batch([segment.text for pieces in segments for segment in pieces]))
        return [_joined([(next(encoded), segment.trains) for segment in pieces]) for pieces in segments]

    def _qwen(self, messages: Messages, tools: list[Any] | None) -> list[Segment]:
        segments: list[Segment] = []
        for number, message in enumerate(messages):
            text = self._render([message], tools if number == 0 else None)
            if number > 0 and message["role"] != "system":
                text = _without_prefix(text, self._system)
            segments += self._split(message, text, is_first=number == 0)
        return segments

    def _qwen3(self, messages: Messages, tools: list[Any] | None) -> list[Segment]:
        segments: list[Segment] = []
        for number, message in enumerate(messages):
            if number == 0:
                text = _without_suffix(self._render([message, _DUMMY], tools), self._user_turn)
            else:
                text = _without_prefix(self._render([_DUMMY, message]), self._system + self._user_turn)
            segments += self._split(message, text, is_first=number == 0)
        return segments

    def _distill_qwen(self, messages: Messages, tools: list[Any] | None) -> list[Segment]:
        prompt = self._tokenizer.render(messages[:1], tools=tools)
        return [Segment(prompt, False), Segment(messages[-1]["content"], _may_train(messages[-1]))]

    def _split(self, message: dict[str, Any], text: str, *, is_first: bool) -> list[Segment]:
        """An assistant's message: the words that prompt it do not train, its own do."""
        if message["role"] != "assistant" or not _may_train(message):
            return [Segment(text, False)]
        lead = (self._system if is_first and text.startswith(self._system) else "") + self._generation_prompt
        return [Segment(lead, False), Segment(_without_prefix(text, lead), True)]

    def _render(self, messages: Messages, tools: list[Any] | None = None) -> str:
        return self._tokenizer.render(messages, tools=tools, add_generation_prompt=False)


def _may_train(message: dict[str, Any]) -> bool:
    return bool(message.get("step_loss_mask", 1) == 1)


def _merged(segments: list[Segment]) -> list[Segment]:
    """Neighbours that train alike as one piece, so that a prompt's tokens are those that generation would see."""
    return [
        Segment("".join(segment.text for segment in alike), trains)
        for trains, alike in groupby(segments, key=lambda segment: segment.trains)
    ]


def _joined(pieces: list[tuple[list[int], bool]]) -> tuple[list[int], list[int]]:
    ids = [token for tokens, _ in pieces for token in tokens]
    mask = [int(trains) for tokens, trains in pieces for _ in tokens]
    return ids, mask


def _without_prefix(text: str, prefix: str) -> str:
    if not text.startswith(prefix):
        raise ValueError(
            f"the chat template does not write {prefix!r} before {text[:80]!r}; try another --loss-mask-type"
        )
    return text[len(prefix) :]


def _without_suffix(text: str, suffix: str) -> str:
    if not text.endswith(suffix):
        raise ValueError(
            f"the chat template does not write {suffix!r} after {text[-80:]!r}; try another --loss-mask-type"
        )
    return text[: len(text) - len(suffix)]

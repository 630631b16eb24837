"""Other prompts that an engine may have seen in place of the recorded one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer

from miles.core.diagnosis.samples import Recorded

Ids = list[int]


def other_prompts(tokenizer_path: Path, samples: Sequence[Recorded]) -> Iterator[tuple[str, list[Ids]]]:
    """Ways to have prompted differently, with the prompt of each sample; those that change nothing are left out."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=True)
    ways: dict[str, Callable[[Recorded], Ids | None]] = {
        "the prompt without its first token": lambda sample: sample.prompt_ids[1:] or None,
        "the prompt after a beginning-of-text token": lambda sample: _after_bos(tokenizer, sample),
        "the prompt without its last token": lambda sample: sample.prompt_ids[:-1] or None,
        "the chat template without a generation prompt": lambda sample: _rendered(tokenizer, sample, False),
        "the chat template as this tokenizer writes it": lambda sample: _rendered(tokenizer, sample, True),
        "the chat template without the tools": lambda sample: _rendered(tokenizer, sample, True, tools=False),
        "the messages' text without the chat template": lambda sample: _plain(tokenizer, sample),
    }
    for says, way in ways.items():
        prompts = [way(sample) for sample in samples]
        known = [prompt or sample.prompt_ids for prompt, sample in zip(prompts, samples, strict=True)]
        if any(prompt != sample.prompt_ids for prompt, sample in zip(known, samples, strict=True)):
            yield says, known


def _after_bos(tokenizer: Any, sample: Recorded) -> Ids | None:
    bos = tokenizer.bos_token_id
    return None if bos is None else [bos, *sample.prompt_ids]


def _rendered(tokenizer: Any, sample: Recorded, generation_prompt: bool, tools: bool = True) -> Ids | None:
    messages = _messages(sample)
    if messages is None or tokenizer.chat_template is None:
        return None
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=sample.tools if tools else None,
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
    except jinja2.TemplateError:
        return None
    ids: Ids = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _plain(tokenizer: Any, sample: Recorded) -> Ids | None:
    messages = _messages(sample)
    if messages is None:
        return None
    ids: Ids = tokenizer.encode("\n".join(str(m.get("content", "")) for m in messages), add_special_tokens=False)
    return ids


def _messages(sample: Recorded) -> list[dict[str, Any]] | None:
    return sample.prompt if isinstance(sample.prompt, list) else None

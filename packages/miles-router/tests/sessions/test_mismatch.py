"""Differences from the template's own rendering are counted by kind."""

from __future__ import annotations

import pytest

from miles.router.sessions.mismatch import KINDS, count_mismatches
from miles.router.tokenizer import CheckpointTokenizer


@pytest.fixture
def count(checkpoint):
    tokenizer = CheckpointTokenizer(checkpoint("chatml"))

    def count(own, canonical, sampled_from=0):
        ids = tokenizer.encode(own)
        sampled = [position >= sampled_from for position in range(len(ids))]
        found = count_mismatches(tokenizer, ids, sampled, tokenizer.encode(canonical))
        assert tuple(found) == KINDS
        return {kind: number for kind, number in found.items() if number}

    return count


def test_same_text_is_no_mismatch(count):
    assert count("<|im_start|>user\nhi<|im_end|>", "<|im_start|>user\nhi<|im_end|>") == {}


def test_missing_special_tokens_are_counted(count):
    assert count("<|im_start|>hi", "<|im_start|>hi<|im_end|>\n<|im_start|>") == {"special_token_count": 2}


def test_other_special_tokens_are_counted(count):
    assert count("<|im_start|>hi<|im_end|>", "<|im_start|>hi<|endoftext|>") == {"special_token_type": 1}


def test_text_is_counted_by_who_wrote_it(count):
    assert count("<|im_start|>a<|im_end|>", "<|im_start|>b<|im_end|>") == {"assistant_text": 1}
    assert count("<|im_start|>a<|im_end|>", "<|im_start|>b<|im_end|>", sampled_from=2) == {"non_assistant_text": 1}


def test_same_text_in_other_tokens_is_no_mismatch(checkpoint):
    tokenizer = CheckpointTokenizer(checkpoint("chatml"))
    letters = [tokenizer.encode(letter)[0] for letter in "the"]
    assert letters != tokenizer.encode("the")
    assert not any(count_mismatches(tokenizer, letters, [True] * 3, tokenizer.encode("the")).values())

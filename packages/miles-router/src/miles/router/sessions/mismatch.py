"""How far a session's token ids are from what the chat template would write for the same conversation now."""

from __future__ import annotations

from collections.abc import Sequence

from miles.router.tokenizer import CheckpointTokenizer

KINDS = ("special_token_count", "special_token_type", "non_assistant_text", "assistant_text")


def count_mismatches(
    tokenizer: CheckpointTokenizer, ids: Sequence[int], sampled: Sequence[bool], canonical: Sequence[int]
) -> dict[str, int]:
    """Number of differences of each kind.

    Both sequences are divided at special tokens.  With different numbers of those there is nothing to compare beyond;
    else the tokens and the texts between them are compared one by one.  ``sampled`` says which of ``ids`` an engine
    wrote: text with such ids is the assistant's.
    """
    own, other = _divide(tokenizer, ids), _divide(tokenizer, canonical)
    counts = dict.fromkeys(KINDS, 0)
    counts["special_token_count"] = abs(len(own) - len(other))
    if counts["special_token_count"]:
        return counts
    for (special, start, end), (canonical_special, canonical_start, canonical_end) in zip(own, other):
        counts["special_token_type"] += special != canonical_special
        if tokenizer.decode(ids[start:end]) != tokenizer.decode(canonical[canonical_start:canonical_end]):
            counts["assistant_text" if any(sampled[start:end]) else "non_assistant_text"] += 1
    return counts


def _divide(tokenizer: CheckpointTokenizer, ids: Sequence[int]) -> list[tuple[int | None, int, int]]:
    """Special token (None at the beginning), and where the text after it begins and ends."""
    pieces: list[tuple[int | None, int, int]] = []
    special, start = None, 0
    for position, token_id in enumerate(ids):
        if token_id in tokenizer.special_ids:
            pieces.append((special, start, position))
            special, start = token_id, position + 1
    pieces.append((special, start, len(ids)))
    return pieces

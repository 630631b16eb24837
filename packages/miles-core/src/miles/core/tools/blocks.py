"""Pieces of text between a pair of marks."""

from __future__ import annotations


def cut_blocks(text: str, begin: str, end: str) -> tuple[str, list[str]]:
    """The text outside of all blocks, stripped, and the inside of each, stripped.

    A block that does not end goes to the end of the text: its end may have been a stop string.
    """
    before, *pieces = text.split(begin)
    outside, inside = [before], []
    for piece in pieces:
        block, _, after = piece.partition(end)
        inside.append(block.strip())
        outside.append(after)
    return "".join(outside).strip(), inside

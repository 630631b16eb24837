"""Texts whose token ids are known because an engine sampled them.

A radix tree over text leads to records; a record is a point at which a token ends.  Its ids are those of the record
before it and its own, so common beginnings are held once, and no id is ever made from text that an engine has written.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Record:
    """What follows ``before`` up to the end of one text.  N = its tokens."""

    before: Record | None
    text: str
    """What the ids add to the text."""
    ids: array[int]
    """N token ids."""
    logps: array[float]
    """N natural-log probabilities; 0.0 where nothing was sampled."""
    sampled: bool
    version: str | None
    """Weight version that sampled it."""

    def repeats(self, other: Record) -> bool:
        """Whether ``other`` says the same of the same tokens."""
        return (self.before, self.ids, self.logps, self.version) == (
            other.before, other.ids, other.logps, other.version,
        )  # fmt: skip

    def chain(self) -> list[Record]:
        """All records up to this one, the first one first."""
        chain: list[Record] = []
        record: Record | None = self
        while record is not None:
            chain.append(record)
            record = record.before
        return chain[::-1]


@dataclass(eq=False, slots=True)
class _Node:
    label: str
    children: dict[str, _Node] = field(default_factory=dict)
    record: Record | None = None


class TextTree:
    """At most ``max_tokens`` tokens; the texts that nobody has asked for the longest time are forgotten first."""

    def __init__(self, max_tokens: int) -> None:
        self.num_tokens = 0
        self._max_tokens = max_tokens
        self._root = _Node("")
        self._by_use: OrderedDict[Record, None] = OrderedDict()  # the one used last at the end

    def __len__(self) -> int:
        return len(self._by_use)

    def find(self, text: str) -> tuple[Record | None, int]:
        """The record of the longest text that ``text`` begins with, and the length of that text."""
        node, at = self._root, 0
        found, end = None, 0
        while at < len(text):
            child = node.children.get(text[at])
            if child is None or not text.startswith(child.label, at):
                break
            node, at = child, at + len(child.label)
            if node.record is not None:
                found, end = node.record, at
        if found is not None:
            self._touch(found)
        return found, end

    def add(
        self,
        before: Record | None,
        text: str,
        ids: Sequence[int],
        logps: Sequence[float] | None,
        version: str | None,
    ) -> Record:
        """Remember that ``ids`` lead from the end of ``before`` to the end of ``text``.

        ``logps`` are those of sampled ids; None when nothing was sampled.  A text that is known gets the new ids, while
        what was built on the old ones keeps them.
        """
        node = self._node(text)
        values = array("d", logps if logps is not None else [0.0] * len(ids))
        start = sum(len(part.text) for part in before.chain()) if before is not None else 0
        record = Record(before, text[start:], array("q", ids), values, logps is not None, version)
        if node.record is not None and record.repeats(node.record):
            self._touch(node.record)
            return node.record
        node.record = record
        self.num_tokens += len(ids)
        self._touch(record)
        while self.num_tokens > self._max_tokens and len(self._by_use) > 1:
            self._remove(next(iter(self._by_use)))
        return record

    def drop_versions(self, outdated: Sequence[str]) -> None:
        """Forget what these weight versions sampled, and what follows it."""
        gone = frozenset(outdated)
        doomed = [record for record in self._by_use if any(part.version in gone for part in record.chain())]
        for record in doomed:
            self._remove(record)

    def versions(self) -> set[str]:
        """Weight versions of all that was sampled."""
        return {record.version for record in self._by_use if record.version is not None}

    def _touch(self, record: Record) -> None:
        """Mark ``record`` as used, and those it needs as used later: they are forgotten after it."""
        for part in reversed(record.chain()):
            if part is record or part in self._by_use:
                self._by_use[part] = None
                self._by_use.move_to_end(part)

    def _remove(self, record: Record) -> None:
        """Forget ``record`` and the nodes that led to it alone."""
        del self._by_use[record]
        self.num_tokens -= len(record.ids)
        path = self._path("".join(part.text for part in record.chain()))
        if path[-1].record is not record:  # its text has got other ids since
            return
        path[-1].record = None
        while len(path) > 1 and path[-1].record is None and not path[-1].children:
            node = path.pop()
            del path[-1].children[node.label[0]]
        node = path[-1]
        if len(path) > 1 and node.record is None and len(node.children) == 1:
            (child,) = node.children.values()
            node.label += child.label
            node.record, node.children = child.record, child.children

    def _path(self, text: str) -> list[_Node]:
        """The nodes that lead to the end of ``text``, or as far towards it as there are any."""
        path, at = [self._root], 0
        while at < len(text):
            child = path[-1].children.get(text[at])
            if child is None:
                break
            path.append(child)
            at += len(child.label)
        return path

    def _node(self, text: str) -> _Node:
        """The node at the end of ``text``, made where there is none."""
        node, at = self._root, 0
        while at < len(text):
            child = node.children.get(text[at])
            if child is None:
                child = node.children[text[at]] = _Node(text[at:])
            else:
                child = _split(node, child, text, at)
            node, at = child, at + len(child.label)
        return node


def _split(parent: _Node, child: _Node, text: str, at: int) -> _Node:
    """``child``, or a new node above it that ends where its label and ``text`` part."""
    label = child.label
    limit = min(len(label), len(text) - at)
    common = next((n for n in range(1, limit) if label[n] != text[at + n]), limit)
    if common == len(label):
        return child
    upper = _Node(label[:common], {label[common]: child})
    child.label = label[common:]
    parent.children[label[0]] = upper
    return upper

"""Continuous batching: which sequences compute what in the next forward pass.

Synchronous and single-threaded; ``runner.py`` gives it a thread.  A step is one forward pass over all running
sequences (one row each) together with the prompts that start now, then one sampling of every sequence that has a new
hidden state.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from miles.rollout.engines.embedded.head import Head
from miles.rollout.engines.embedded.kv import KVCache, Pool
from miles.rollout.engines.embedded.model import Model
from miles.rollout.engines.embedded.planning import CHUNK, Block, make_plan, padded_length
from miles.rollout.engines.embedded.prefixes import PrefixTable
from miles.rollout.engines.embedded.sequence import Finish, Progress, Seats, Sequence

PauseMode = Literal["abort", "retract", "in_place"]
_EXPECTED_OUTPUT = 64
"""A slot is chosen for this much output, or as much as the prompt; a longer output moves to larger slots."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much the scheduler may take on at once."""

    max_running: int = 256
    context_length: int = 4096
    kv_tokens: int = 1 << 20
    prefill_tokens: int = 2048
    """Prompt tokens that join one step, unless a single prompt is longer."""


@dataclass(slots=True)
class Counters:
    """Totals since the start."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    aborted: int = 0
    retracted: int = 0


@dataclass(slots=True, eq=False)
class _Batch:
    """What one step computes."""

    decoding: list[tuple[Pool[Sequence], int]]
    """(pool, how many of its first slots)"""
    blocks: list[Block] = field(default_factory=list)
    """Prompts to compute."""
    followers: list[tuple[Sequence, Sequence]] = field(default_factory=list)
    """(sequence, the one whose equal prompt is copied)"""
    num_prompt_tokens: int = 0


class Scheduler:
    """See the module's text."""

    def __init__(self, model: Model, limits: Limits, version: str = "default") -> None:
        self.model = model
        self.limits = limits
        self.version = version
        self.counters = Counters()
        self.paused = False
        self.updating = False
        """A weight update is under way: its half-written weights must not compute anything."""
        self.released: frozenset[str] = frozenset()
        """Kinds of memory that are given away for a while; nothing can be computed without them."""
        self.waiting: deque[Sequence] = deque()
        self.kv: KVCache[Sequence] = KVCache(model.kv_shape, limits.context_length, limits.kv_tokens)
        self.seats = Seats(limits.max_running)
        self._prefixes = PrefixTable()
        self._head = Head(model, self.seats)

    # -- requests ------------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def abort(self, matches: Callable[[Sequence], bool], message: str = "Aborted") -> int:
        """End every matching sequence with what it has.  Returns how many."""
        finish: Finish = {"type": "abort", "message": message}
        queued = [sequence for sequence in self.waiting if matches(sequence)]
        if queued:
            self.waiting = deque(sequence for sequence in self.waiting if not matches(sequence))
        active = [sequence for sequence in self.running() if matches(sequence)]
        self._leave_slots(active)
        for sequence in (*queued, *active):
            self._end(sequence, finish)
        self.counters.aborted += len(queued) + len(active)
        return len(queued) + len(active)

    def running(self) -> list[Sequence]:
        """Sequences that hold a slot, in row order."""
        return [sequence for pool in self.kv.pools for sequence in pool.owners]

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return (
            self.paused
            or self.updating
            or bool(self.released)
            or not (self.waiting or any(pool.owners for pool in self.kv.pools))
        )

    # -- pausing and weights -------------------------------------------------------------------------------------

    def pause(self, mode: PauseMode) -> None:
        """Stop stepping.  Running sequences end, go back to the queue without their cache, or stay as they are."""
        self.paused = True
        if mode == "abort":
            self.abort(lambda _: True)
        elif mode == "retract":
            self._retract(self.running())

    def resume(self) -> None:
        """Step again."""
        self.paused = False

    def set_version(self, version: str) -> None:
        """The weights are from now on those of ``version``; tokens made so far keep the version that made them."""
        for sequence in (*self.running(), *self.waiting):
            made = self._made(sequence)
            if made and version != self.version:
                sequence.version_events.append((self.version, made))
        self.version = version

    def weights_changed(self) -> None:
        """Forget every prompt computed with the weights before."""
        self._prefixes.clear()

    # -- stepping ------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One forward pass and one sampling, when there is anything to do."""
        if not self.idle:
            with torch.inference_mode():
                self._step()

    def _step(self) -> None:
        self._grow_full_slots()
        batch = self._admit()
        for block in batch.blocks:
            self._compute_long_prompt(block)
        plan, last_rows = make_plan(batch.decoding, batch.blocks, self.seats, self.model.row_multiple)
        hidden = self.model.forward(plan)
        self.counters.steps += 1
        rows, states = self._settle(batch, hidden, last_rows)
        if batch.blocks or batch.followers:
            rows, states = self._end_prompt_only(rows, states)
        if rows:
            self._sample(rows, states)

    def _grow_full_slots(self) -> None:
        """Move every sequence whose slot is full to larger slots, or back to the queue when there is no memory."""
        for pool in self.kv.pools[:-1]:
            full = [owner for owner in pool.owners if self.seats.held[owner.seat] >= pool.capacity]
            if not full:
                continue
            target = self.kv.pool_for(pool.capacity + 1)
            if not self.kv.reserve(target, len(full)):
                self._retract(full)
                continue
            first = len(target.owners)
            self.kv.copy([(pool, s.slot, target, first + i) for i, s in enumerate(full)], pool.capacity)
            self._leave_slots(full, keep_prefix=True)
            self._take_slots(full, target)

    def _admit(self) -> _Batch:
        """Take sequences from the queue as far as seats, memory and the prompt budget go, in order."""
        batch = _Batch([(pool, len(pool.owners)) for pool in self.kv.pools if pool.owners])
        leaders: dict[bytes, Sequence] = {}
        admitted: list[tuple[Sequence, list[int], Pool[Sequence], Sequence | None]] = []
        while self.waiting and (self.seats.free or self.waiting[0].seat >= 0):
            sequence = self.waiting[0]
            tokens = sequence.prompt + self.seats.output(sequence)[0]
            key = self._prefixes.key(tokens)
            source = None
            if sequence.score_from is None:
                source = leaders.get(key) or self._prefixes.find(key)
            size = 0 if source else padded_length(len(tokens))
            if batch.num_prompt_tokens and batch.num_prompt_tokens + size > self.limits.prefill_tokens:
                break
            pool = self.kv.pool_for(self._expected_length(sequence, len(tokens)))
            if not self.kv.reserve(pool, 1):
                break
            self.waiting.popleft()
            batch.num_prompt_tokens += size
            if source is None and sequence.score_from is None:
                leaders[key] = sequence
            admitted.append((sequence, tokens, pool, source))
            if sequence.seat < 0:
                self.seats.take(sequence)
            sequence.prompt_logps, sequence.prompt_top_logps = [], []
        self._place(batch, admitted)
        return batch

    def _place(
        self, batch: _Batch, admitted: list[tuple[Sequence, list[int], Pool[Sequence], Sequence | None]]
    ) -> None:
        """Give admitted sequences their slots: equal blocks side by side, copies behind."""
        new = [(s, tokens, pool) for s, tokens, pool, source in admitted if source is None]
        new.sort(key=lambda item: (item[2].capacity, padded_length(len(item[1]))))
        for sequence, tokens, pool in new:
            self._take_slots([sequence], pool)
            batch.blocks.append(Block(sequence, tokens))
        for sequence, tokens, pool, source in admitted:
            if source is not None:
                self._take_slots([sequence], pool)
                batch.followers.append((sequence, source))
            if sequence.num_retractions == 0:
                self.counters.prompt_tokens += len(tokens)
                sequence.cached_tokens = len(tokens) if source else 0
                self.counters.cached_tokens += sequence.cached_tokens
            self.seats.held[sequence.seat] = len(tokens)

    def _compute_long_prompt(self, block: Block) -> None:
        """All chunks of a prompt but the last."""
        while len(block.tokens) - block.start > CHUNK:
            piece = Block(block.sequence, block.tokens[: block.start + CHUNK], block.start)
            plan, _ = make_plan([], [piece], self.seats, self.model.row_multiple)
            self._score(piece, self.model.forward(plan)[:CHUNK])
            block.start += CHUNK

    def _score(self, block: Block, hidden: torch.Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow the block's own, where they are wanted."""
        sequence = block.sequence
        if sequence.score_from is None:
            return
        first = max(block.start, sequence.score_from)
        targets = sequence.prompt[first + 1 : len(block.tokens) + 1]
        if targets:
            offset = first - block.start
            self._head.score(sequence, hidden[offset : offset + len(targets)], targets)

    def _settle(self, batch: _Batch, hidden: torch.Tensor, last_rows: list[int]) -> tuple[list[Sequence], torch.Tensor]:
        """Store what the pass computed; return every sequence with a new hidden state, and these [N, hidden]."""
        rows: list[Sequence] = []
        for pool, count in batch.decoding:
            rows += pool.owners[:count]
        self.seats.held[[sequence.seat for sequence in rows]] += 1
        parts = [hidden[: len(rows)]]
        for block, row in zip(batch.blocks, last_rows, strict=True):
            self._score(block, hidden[row + 1 - len(block.tokens) + block.start : row + 1])
            if block.sequence.score_from is None:
                self._prefixes.add(self._prefixes.key(block.tokens), block.sequence, hidden[row].clone())
        if batch.blocks:
            parts.append(hidden[last_rows])
            rows += [block.sequence for block in batch.blocks]
        if batch.followers:
            self._copy_prompts(batch.followers)
            parts.append(torch.stack([self._prefixes.hidden(source) for _, source in batch.followers]))
            rows += [sequence for sequence, _ in batch.followers]
        return rows, torch.cat(parts)

    def _copy_prompts(self, followers: list[tuple[Sequence, Sequence]]) -> None:
        moves = []
        for sequence, source in followers:
            assert source.pool is not None
            assert sequence.pool is not None
            moves.append((source.pool, source.slot, sequence.pool, sequence.slot))
        self.kv.copy(moves, max(int(self.seats.held[sequence.seat]) for sequence, _ in followers))

    def _end_prompt_only(self, rows: list[Sequence], hidden: torch.Tensor) -> tuple[list[Sequence], torch.Tensor]:
        """End sequences that wanted no output; return the others."""
        ended = [sequence for sequence in rows if sequence.params.max_new_tokens == 0]
        if not ended:
            return rows, hidden
        keep = [row for row, sequence in enumerate(rows) if sequence.params.max_new_tokens > 0]
        self._leave_slots(ended)
        for sequence in ended:
            self._end(sequence, {"type": "length", "length": 0})
        return [rows[row] for row in keep], hidden[keep]

    def _sample(self, sequences: list[Sequence], hidden: torch.Tensor) -> None:
        """Draw the next token of each of ``sequences`` from its hidden state, and end those that are done."""
        rows = self._head.rows(sequences)
        tokens, logps = self._head.draw(rows, hidden)
        matched, full = self.seats.record(rows.seats, tokens, logps)
        broken = np.isnan(logps)
        self.counters.generated_tokens += len(sequences)
        finishes: dict[int, Finish] = {}
        for row in np.flatnonzero(full).tolist():
            finishes[row] = {"type": "length", "length": sequences[row].params.max_new_tokens}
        for row in np.flatnonzero(matched).tolist():
            finishes[row] = {"type": "stop", "matched": int(tokens[row])}
        for row, sequence in rows.stopping:
            text = sequence.matches_stop and sequence.matches_stop(self.seats.output(sequence)[0])
            if text is not None:
                finishes[row] = {"type": "stop", "matched": text}
        for row in np.flatnonzero(broken).tolist():
            finishes[row] = {"type": "abort", "message": "the model's probabilities are not numbers"}
        for row, sequence in rows.streaming:
            if row not in finishes:
                sequence.notify(self._progress(sequence, None))
        ended = [sequences[row] for row in finishes]
        self._leave_slots(ended)
        for sequence, finish in zip(ended, finishes.values(), strict=True):
            self._end(sequence, finish)

    # -- slots ---------------------------------------------------------------------------------------------------

    def _expected_length(self, sequence: Sequence, num_tokens: int) -> int:
        left = sequence.params.max_new_tokens - self._made(sequence)
        return min(num_tokens + min(left, max(_EXPECTED_OUTPUT, num_tokens)), self.limits.context_length)

    def _made(self, sequence: Sequence) -> int:
        return int(self.seats.made[sequence.seat]) if sequence.seat >= 0 else 0

    def _take_slots(self, sequences: list[Sequence], pool: Pool[Sequence]) -> None:
        """Give ``sequences`` slots that were promised to them."""
        for sequence in sequences:
            sequence.pool, sequence.slot = pool, self.kv.place(pool, sequence)

    def _leave_slots(self, sequences: list[Sequence], *, keep_prefix: bool = False) -> None:
        """Free the slots of ``sequences``; the last sequences of their pools move into the holes."""
        for sequence in sequences:
            if sequence.wants_experts and sequence.pool is not None:
                # Of all tokens that were computed: all but the newest, and no more than that for a prompt alone.
                computed = min(int(self.seats.held[sequence.seat]), len(sequence.prompt) + self._made(sequence) - 1)
                sequence.experts = sequence.pool.read_experts(sequence.slot, computed)
        for pool in self.kv.pools:
            leaving = [sequence for sequence in sequences if sequence.pool is pool]
            if not leaving:
                continue
            longest = max(int(self.seats.held[owner.seat]) for owner in pool.owners)
            for hole in self.kv.release(pool, [sequence.slot for sequence in leaving], longest):
                pool.owners[hole].slot = hole
        for sequence in sequences:
            sequence.pool, sequence.slot = None, -1
            if not keep_prefix:
                self._prefixes.discard(sequence)

    def _retract(self, sequences: list[Sequence]) -> None:
        """Put running sequences back to the head of the queue; their output stays, their cache goes."""
        self._leave_slots(sequences)
        self.counters.retracted += len(sequences)
        for sequence in sequences:
            sequence.num_retractions += 1
        self.waiting.extendleft(sorted(sequences, key=lambda sequence: sequence.created, reverse=True))

    def _end(self, sequence: Sequence, finish: Finish) -> None:
        """Tell the owner of a sequence that has left its slot."""
        sequence.finished = time.perf_counter()
        self.counters.finished += 1
        progress = self._progress(sequence, finish)
        if sequence.seat >= 0:
            self.seats.give(sequence)
        sequence.notify(progress)

    def _progress(self, sequence: Sequence, finish: Finish | None) -> Progress:
        tokens, logps = self.seats.output(sequence)
        return Progress(sequence, tokens, logps, finish, sequence.version_spans(self.version, len(tokens)))

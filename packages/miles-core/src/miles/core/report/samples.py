"""The samples that the page shows: held-out prompts before and after, and some of what was trained on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from miles.core.report.results import FULL_REWARD, Row, read_rows, reward_of
from miles.core.run_directory import RunDirectory

MAX_PAIRS = 40
"""Prompts shown before and after."""
MAX_ROLLOUTS = 8
MAX_GROUPS = 2
MAX_GROUP_SIZE = 8
HEAD_TOKENS, TAIL_TOKENS = 600, 200
"""Of a longer response the page shows this many tokens from its start and from its end."""

Json = dict[str, Any]
KINDS = ("became right", "became wrong", "stayed right", "stayed wrong")


def comparisons(run: RunDirectory, reward_key: str | None) -> list[Json]:
    """For each evaluation data set: the first evaluation and the last one, prompt by prompt."""
    files = defaultdict(list)
    for rollout_id, dataset, path in run.eval_files():
        files[dataset].append((rollout_id, path))
    shown = []
    for dataset, evaluated in files.items():
        (first, before), (last, after) = evaluated[0], evaluated[-1]
        if first == last:
            continue
        pairs = list(_pairs(read_rows(before), read_rows(after), reward_key))
        shown.append(
            {
                "dataset": dataset,
                "before": first,
                "after": last,
                "counts": Counter(pair["kind"] for pair in pairs),
                "pairs": _mixture(pairs),
            }
        )
    return shown


def rollout_groups(run: RunDirectory, reward_key: str | None, *, scored: bool = True) -> list[Json]:
    """A few groups of a few rollouts, evenly spaced over the run; conversations to imitate are not ``scored``."""
    files = list(run.rollout_files())
    if len(files) > MAX_ROLLOUTS:
        last = len(files) - 1
        files = [files[round(place * last / (MAX_ROLLOUTS - 1))] for place in range(MAX_ROLLOUTS)]
    return [
        {"rollout_id": rollout_id, "groups": list(_first_groups(read_rows(path), reward_key, scored))}
        for rollout_id, path in files
    ]


def sample_json(row: Row, reward_key: str | None, *, scored: bool = True) -> Json:
    """What the page needs of a sample: per token its text, id, log-probability and whether it trains."""
    length = row["response_length"]
    ids = row["tokens"][len(row["tokens"]) - length :]
    pieces = row.get("pieces") or [row["response"], *[""] * (length - 1)]
    logps = row.get("rollout_log_probs")
    mask = row.get("loss_mask")
    trains = not row.get("remove_sample")
    tokens = [
        [
            pieces[place],
            ids[place],
            None if logps is None else round(logps[place], 4),
            int(trains and (mask is None or bool(mask[place]))),
        ]
        for place in _shown_places(length)
    ]
    return {
        "reward": reward_of(row, reward_key) if scored else None,
        "status": row.get("status"),
        "length": length,
        "tokens": tokens,
        "head": min(HEAD_TOKENS, len(tokens)),
    }


def prompt_text(prompt: str | Sequence[Json]) -> str:
    """What was asked, as text; of a conversation, its turns without the answer to imitate."""
    if isinstance(prompt, str):
        return prompt
    turns = prompt[:-1] if prompt[-1].get("role") == "assistant" else prompt
    return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)


def _pairs(before: Iterator[Row], after: Iterator[Row], reward_key: str | None) -> Iterator[Json]:
    for old, new in zip(before, after, strict=False):
        was_right, is_right = (reward_of(row, reward_key) >= FULL_REWARD for row in (old, new))
        verb = "stayed" if was_right == is_right else "became"
        yield {
            "kind": f"{verb} {'right' if is_right else 'wrong'}",
            "prompt": prompt_text(new["prompt"]),
            "label": new.get("label"),
            "before": sample_json(old, reward_key),
            "after": sample_json(new, reward_key),
        }


def _mixture(pairs: list[Json]) -> list[Json]:
    """Up to ``MAX_PAIRS`` of them, an equal share of every kind where there are enough."""
    by_kind = [[pair for pair in pairs if pair["kind"] == kind] for kind in KINDS]
    taken: list[Json] = []
    for rank in range(MAX_PAIRS):
        taken += [kind[rank] for kind in by_kind if rank < len(kind)]
    taken = taken[:MAX_PAIRS]
    return sorted(taken, key=lambda pair: KINDS.index(pair["kind"]))


def _first_groups(rows: Iterator[Row], reward_key: str | None, scored: bool) -> Iterator[Json]:
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.get("group_index")].append(row)
        if len(groups) > MAX_GROUPS:
            break
    for members in list(groups.values())[:MAX_GROUPS]:
        yield {
            "prompt": prompt_text(members[0]["prompt"]),
            "label": members[0].get("label"),
            "size": len(members),
            "samples": [sample_json(row, reward_key, scored=scored) for row in members[:MAX_GROUP_SIZE]],
        }


def _shown_places(length: int) -> list[int]:
    if length <= HEAD_TOKENS + TAIL_TOKENS:
        return list(range(length))
    return [*range(HEAD_TOKENS), *range(length - TAIL_TOKENS, length)]

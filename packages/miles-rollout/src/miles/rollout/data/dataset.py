"""All prompts of a run: checked once at the start, read from disk when they are drawn."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from miles.core.errors import DataError
from miles.rollout.data.files import Rows, open_rows, parse_paths
from miles.rollout.data.prompts import Prompt, PromptFormat

if TYPE_CHECKING:
    from miles.rollout.text import ChatTokenizer

logger = logging.getLogger(__name__)

MAX_REPORTED_ROWS = 20
"""Malformed rows that an error lists; the rest is counted."""
_TOKENIZE_ROWS = 1024


class PromptDataset:
    """The usable rows of one or more files, in file order."""

    def __init__(
        self, files: list[Rows], usable: npt.NDArray[np.int64], form: PromptFormat, tokenizer: ChatTokenizer | None
    ) -> None:
        self._files, self._form, self._tokenizer = files, form, tokenizer
        self._usable = usable
        self._ends = np.cumsum([len(rows) for rows in files])

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, index: int) -> Prompt:
        rows, row = self._locate(int(self._usable[index]))
        try:
            return self._form.render(self._form.read(rows[row]), self._tokenizer)
        except ValueError as error:
            raise DataError(f"{rows.where(row)}: {error}") from error

    @property
    def num_too_long(self) -> int:
        """Rows left out because their prompt is longer than the limit."""
        return int(self._ends[-1]) - len(self._usable)

    def order(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """The shuffled order of one epoch, from a generator of its own."""
        return np.random.default_rng(seed + epoch).permutation(len(self))

    def _locate(self, row: int) -> tuple[Rows, int]:
        file = int(np.searchsorted(self._ends, row, side="right"))
        return self._files[file], row - (int(self._ends[file - 1]) if file else 0)


def open_dataset(
    paths: str,
    form: PromptFormat,
    tokenizer: ChatTokenizer | None = None,
    *,
    max_prompt_len: int | None = None,
    max_prompt_flag: str = "--rollout-max-prompt-len",
) -> PromptDataset:
    """Read and check every row of ``paths``.

    Prompts of more than ``max_prompt_len`` tokens are left out, counted and reported; message lists that no template
    turns into text are not measured.  Raises DataError that lists the malformed rows, or says that nothing is left.
    """
    files = [open_rows(source, form.columns) for source in parse_paths(paths)]
    if sum(len(rows) for rows in files) == 0:
        raise DataError(f"{paths}: no rows")
    _raise_malformed(files, form)
    usable = np.arange(sum(len(rows) for rows in files), dtype=np.int64)
    dataset = PromptDataset(files, usable, form, tokenizer)
    if max_prompt_len is None:
        return dataset
    assert tokenizer is not None, "a prompt length limit needs a tokenizer"
    short = _short_enough(dataset, tokenizer, max_prompt_len)
    if not short.any():
        raise DataError(f"{paths}: all {len(short)} prompts are longer than {max_prompt_flag} {max_prompt_len}")
    if not short.all():
        num_long, limit = int((~short).sum()), f"{max_prompt_flag} {max_prompt_len}"
        logger.warning("%s: left out %d of %d prompts, longer than %s", paths, num_long, len(short), limit)
    return PromptDataset(files, usable[short], form, tokenizer)


def _raise_malformed(files: list[Rows], form: PromptFormat) -> None:
    problems: list[str] = []
    total = 0
    for rows in files:
        for index in range(len(rows)):
            try:
                form.read(rows[index])
            except ValueError as error:
                total += 1
                if len(problems) < MAX_REPORTED_ROWS:
                    problems.append(f"{rows.where(index)}: {error}")
    if total:
        rest = f"\n  ... and {total - len(problems)} more" if total > len(problems) else ""
        raise DataError(f"{total} malformed {'row' if total == 1 else 'rows'}:\n  " + "\n  ".join(problems) + rest)


def _short_enough(dataset: PromptDataset, tokenizer: ChatTokenizer, limit: int) -> npt.NDArray[np.bool_]:
    short = np.ones(len(dataset), bool)
    for start in range(0, len(dataset), _TOKENIZE_ROWS):
        prompts = [dataset[index] for index in range(start, min(start + _TOKENIZE_ROWS, len(dataset)))]
        measured = [
            (start + place, prompt.text) for place, prompt in enumerate(prompts) if isinstance(prompt.text, str)
        ]
        for (index, _), ids in zip(measured, tokenizer.encode_batch([text for _, text in measured]), strict=True):
            short[index] = len(ids) <= limit
    return short

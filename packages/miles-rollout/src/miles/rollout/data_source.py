"""Where prompts come from: the data set in its order, and groups that were given back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from miles.core.errors import CheckpointError, ConfigError
from miles.core.registry import Registry
from miles.core.types.hooks import BufferFilter
from miles.core.types.sample import Group, Sample
from miles.rollout import sample_json
from miles.rollout.data import PromptDataset, PromptFormat, open_dataset
from miles.rollout.filter_hub.buffer_filters import pop_first
from miles.rollout.text import load_tokenizer

logger = logging.getLogger(__name__)

FILTERS = Registry("miles.filters")
FORMAT = 1


class RolloutDataSource:
    """Groups of fresh samples, epoch after epoch.

    Indices of groups and samples count up over the whole run, so they identify a prompt and seed its sampling.
    ``args`` are the flags by their flat names.
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        self.epoch = 0
        self.offset = 0
        """Prompts of this epoch that were drawn."""
        self.group_index = 0
        self.sample_index = 0
        self.metadata: dict[str, Any] = {}
        """Plain values that a rollout function remembers over a resume."""
        self.dataset: PromptDataset | None = None
        if args.rollout_global_dataset:
            self.dataset = _open_prompts(args)
        self._order = self._epoch_order()

    def get_samples(self, num_samples: int) -> list[Group]:
        """Exactly ``num_samples`` new groups; a request may run over the end of an epoch, or of several."""
        return [self._new_group() for _ in range(num_samples)]

    def add_samples(self, samples: list[Group]) -> None:
        """Not possible without a buffer."""
        raise ConfigError(
            f"--data-source-path {type(self).__name__} takes no groups back; over-sampling, dynamic filters and "
            "partial rollout need a source with a buffer: miles.rollout.data_source.RolloutDataSourceWithBuffer"
        )

    def state(self) -> dict[str, Any]:
        """Everything that ``set_state`` needs, as plain values and samples."""
        return {
            "format": FORMAT,
            "epoch": self.epoch,
            "offset": self.offset,
            "group_index": self.group_index,
            "sample_index": self.sample_index,
            "metadata": self.metadata,
            **self._identity(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken; CheckpointError when the prompts or their order are not the same."""
        self._check_identity(state)
        self.epoch, self.offset = state["epoch"], state["offset"]
        self.group_index, self.sample_index = state["group_index"], state["sample_index"]
        self.metadata = dict(state.get("metadata", {}))
        self._order = self._epoch_order()

    def save_to(self, path: Path) -> None:
        """Write the state into the file ``path``."""
        try:
            path.write_bytes(sample_json.dumps(self.state()))
        except TypeError as error:
            raise CheckpointError(f"{path}: a sample in the buffer cannot be saved: {error}") from error

    def load_from(self, path: Path) -> None:
        """Read what ``save_to`` wrote."""
        try:
            state = orjson.loads(path.read_bytes())
        except (OSError, orjson.JSONDecodeError) as error:
            raise CheckpointError(f"{path}: the data source's state cannot be read: {error}") from error
        if state.get("format") != FORMAT:
            raise CheckpointError(f"{path}: format {state.get('format')!r}, this version reads {FORMAT}")
        self.set_state(state)

    def save(self, rollout_id: int) -> None:
        """Write the state under ``--save``; a run's own checkpoints use ``save_to``."""
        path = self._state_path(self.args.save, rollout_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.save_to(path)

    def load(self, rollout_id: int | None = None) -> None:
        """Read the state that ``save`` wrote after ``rollout_id`` under ``--load``; None: nothing to read."""
        if rollout_id is not None:
            self.load_from(self._state_path(self.args.load, rollout_id))

    @staticmethod
    def _state_path(directory: str | None, rollout_id: int) -> Path:
        if directory is None:
            raise ConfigError("the data source has no directory: give --save (and --load to continue)")
        return Path(directory) / "rollout" / f"data_source_{rollout_id}.json"

    def _new_group(self) -> Group:
        group = [self._new_sample(fields) for fields in self._prompt_fields()]
        self.group_index += 1
        return group

    def _new_sample(self, prompt_fields: dict[str, Any]) -> Sample:
        sample = Sample(group_index=self.group_index, index=self.sample_index, **prompt_fields)
        self.sample_index += 1
        return sample

    def _prompt_fields(self) -> Iterator[dict[str, Any]]:
        """Prompt, label and metadata for each sample of a group, which share nothing that can change."""
        count = self.args.n_samples_per_prompt
        if self.dataset is None:
            yield from ({} for _ in range(count))
            return
        prompt = self.dataset[self._next_row(self.dataset)]
        fields = {
            "prompt": prompt.text,
            "label": prompt.label,
            "metadata": prompt.metadata,
            "multimodal_inputs": prompt.media,
        }
        yield from (copy.deepcopy(fields) for _ in range(count - 1))
        yield fields

    def _next_row(self, dataset: PromptDataset) -> int:
        if self.offset == len(dataset):
            self.epoch += 1
            self.offset = 0
            self._order = self._epoch_order()
        row = self.offset if self._order is None else int(self._order[self.offset])
        self.offset += 1
        return row

    def _epoch_order(self) -> npt.NDArray[np.int64] | None:
        """Shuffled rows of the current epoch; None: file order."""
        if self.dataset is None or not self.args.rollout_shuffle:
            return None
        return self.dataset.order(self.args.rollout_seed, self.epoch)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a position to mean the same prompt."""
        return {
            "num_prompts": None if self.dataset is None else len(self.dataset),
            "rollout_shuffle": self.args.rollout_shuffle,
            "rollout_seed": self.args.rollout_seed,
            "n_samples_per_prompt": self.args.n_samples_per_prompt,
        }

    def _check_identity(self, state: dict[str, Any]) -> None:
        changed = [
            f"{name} was {state.get(name)!r}, now {value!r}"
            for name, value in self._identity().items()
            if state.get(name) != value
        ]
        if changed:
            raise CheckpointError(
                "the checkpoint's position in the prompt data is meaningless now: "
                + "; ".join(changed)
                + ". Restore the old values, or start a new run from the exported weights"
            )


class RolloutDataSourceWithBuffer(RolloutDataSource):
    """Groups that were given back, oldest prompt first, then fresh ones.

    ``--buffer-filter-path`` chooses which groups leave the buffer; by default the first.
    """

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.buffer: list[Group] = []
        self.buffer_filter: BufferFilter = (
            FILTERS.get(args.buffer_filter_path) if args.buffer_filter_path else pop_first
        )

    def get_samples(self, num_samples: int) -> list[Group]:
        """Exactly ``num_samples`` groups."""
        groups = self._from_buffer(num_samples)
        return groups + super().get_samples(num_samples - len(groups))

    def add_samples(self, samples: list[Group]) -> None:
        """Take groups back.  Order of arrival does not matter: the buffer is kept in order of group index."""
        expected = self.args.n_samples_per_prompt
        for group in samples:
            if len(group) != expected:
                raise ValueError(f"a group of {len(group)} samples was given back, expected {expected}")
        self.buffer.extend(samples)
        self.buffer.sort(key=_group_index)

    def get_buffer_length(self) -> int:
        """Groups waiting in the buffer."""
        return len(self.buffer)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "buffer": list(self.buffer)}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self.buffer = [[_sample(sample) for sample in group] for group in state["buffer"]]

    def _from_buffer(self, num_samples: int) -> list[Group]:
        if not self.buffer or num_samples == 0:
            return []
        groups = self.buffer_filter(self.args, None, self.buffer, num_samples)
        if len(groups) > num_samples:
            raise ValueError(
                f"--buffer-filter-path {self.args.buffer_filter_path} returned {len(groups)} groups, asked for at most "
                f"{num_samples}"
            )
        return groups


def _group_index(group: Group) -> int:
    return -1 if group[0].group_index is None else group[0].group_index


def _sample(value: Sample | dict[str, Any]) -> Sample:
    return copy.deepcopy(value) if isinstance(value, Sample) else sample_json.loads_sample(value)


def _open_prompts(args: Any) -> PromptDataset:
    if args.prompt_data is None:
        raise ConfigError(
            "--prompt-data is not set: name a .jsonl or .parquet file, or give --disable-rollout-global-dataset if the "
            "rollout function brings its own prompts"
        )
    form = prompt_format(args)
    needs_tokenizer = form.apply_chat_template or args.rollout_max_prompt_len is not None
    return open_dataset(
        args.prompt_data,
        form,
        load_tokenizer(args.hf_checkpoint) if needs_tokenizer else None,
        max_prompt_len=args.rollout_max_prompt_len,
    )


def prompt_format(args: Any) -> PromptFormat:
    """How ``--prompt-data`` rows become prompts."""
    return PromptFormat(
        input_key=args.input_key,
        label_key=args.label_key,
        metadata_key=args.metadata_key,
        tool_key=args.tool_key,
        # Supervised fine-tuning writes whole conversations itself.
        apply_chat_template=args.apply_chat_template and args.loss_type != "sft_loss",
        chat_template_kwargs=args.apply_chat_template_kwargs,
        multimodal_keys=args.multimodal_keys or {},
    )

"""Which data sets are evaluated, and how: ``--eval-prompt-data`` or ``--eval-config``.  Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from miles.core.errors import ConfigError
from miles.core.flags.data import Data
from miles.rollout.data import PromptFormat
from miles.rollout.flags import Evaluation, Rollout
from miles.rollout.sampling import SamplingSettings

if TYPE_CHECKING:
    from miles.core.config import Config

_SETTINGS = {
    "rm_type": str,
    "input_key": str,
    "label_key": str,
    "tool_key": str,
    "metadata_key": str,
    "n_samples_per_eval_prompt": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "max_response_len": int,
    "min_new_tokens": int,
    "stop": list,
    "stop_token_ids": list,
    "custom_generate_function_path": str,
    "metadata_overrides": dict,
}
"""Settings of a data set, and of ``defaults``, with their types."""


@dataclass(frozen=True, slots=True)
class EvalDataset:
    """One evaluation data set."""

    name: str
    path: str
    form: PromptFormat
    settings: SamplingSettings
    num_samples: int = 1
    """Responses per prompt."""
    max_prompt_len: int | None = None
    rm_type: str | None = None
    generate_function_path: str | None = None
    metadata_overrides: dict[str, Any] = field(default_factory=dict)


def eval_datasets(config: Config) -> list[EvalDataset]:
    """The data sets of a run, in order.  Every setting comes from the data set, else ``defaults``, else the flags.

    Raises ConfigError with everything that is wrong.
    """
    evaluation = config[Evaluation]
    problems: list[str] = []
    if evaluation.eval_config is not None:
        entries, defaults = _read_config(evaluation.eval_config, problems)
    else:
        entries, defaults = _read_pairs(evaluation.eval_prompt_data or [], problems), {}
    names = [entry["name"] for entry in entries]
    problems += [f"evaluation data set {name!r} is named twice" for name in sorted(set(names)) if names.count(name) > 1]
    if problems:
        raise ConfigError(*problems)
    return [_dataset(config, {**defaults, **entry}) for entry in entries]


def check_eval_datasets(config: Config) -> list[str]:
    """Problems with the evaluation data sets, found before a process starts."""
    try:
        datasets = eval_datasets(config)
    except ConfigError as error:
        return list(error.problems)
    if config[Evaluation].eval_interval is not None and not datasets:
        return [
            f"--eval-interval {config[Evaluation].eval_interval}: there is nothing to evaluate on; give "
            "--eval-prompt-data NAME PATH"
        ]
    return []


def _read_pairs(values: list[str], problems: list[str]) -> list[dict[str, Any]]:
    if len(values) == 1:
        return [{"name": "aime", "path": values[0]}]
    if len(values) % 2:
        problems.append(
            f"--eval-prompt-data {' '.join(values)}: expected pairs of a name and a path, found {len(values)} values"
        )
        return []
    return [{"name": name, "path": path} for name, path in zip(values[::2], values[1::2], strict=True)]


def _read_config(path: str, problems: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    where = f"--eval-config {path}"
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        problems.append(f"{where}: cannot be read: {error}")
        return [], {}
    section = content.get("eval", content) if isinstance(content, Mapping) else None
    if not isinstance(section, Mapping):
        problems.append(f"{where}: expected a mapping with 'datasets' and perhaps 'defaults'")
        return [], {}
    if unknown := set(section) - {"datasets", "defaults"}:
        problems.append(f"{where}: unknown {sorted(map(str, unknown))}; expected 'datasets' and perhaps 'defaults'")
    defaults = _settings(section.get("defaults") or {}, f"{where}, defaults", problems)
    found = section.get("datasets") or []
    if isinstance(found, Mapping):
        found = [{"name": name, **(entry or {})} for name, entry in found.items()]
    entries = [
        entry for number, raw in enumerate(found, 1) if (entry := _entry(raw, f"{where}, data set {number}", problems))
    ]
    if not found:
        problems.append(f"{where}: 'datasets' is missing or empty")
    return entries, defaults


def _entry(raw: Any, where: str, problems: list[str]) -> dict[str, Any] | None:
    if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str) or not isinstance(raw.get("path"), str):
        problems.append(f"{where}: expected a mapping with a 'name' and a 'path', found {raw!r}")
        return None
    settings = {key: value for key, value in raw.items() if key not in ("name", "path")}
    return {"name": raw["name"], "path": raw["path"], **_settings(settings, f"{where} ({raw['name']})", problems)}


def _settings(raw: Any, where: str, problems: list[str]) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        problems.append(f"{where}: expected a mapping, found {type(raw).__name__}")
        return {}
    settings = {}
    for key, value in raw.items():
        kind = _SETTINGS.get(key)
        if kind is None:
            nearest = difflib.get_close_matches(str(key), _SETTINGS, n=1)
            problems.append(
                f"{where}: unknown setting {key!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else "")
            )
        elif value is not None:
            value = [value] if kind is list and not isinstance(value, list) else value
            value = float(value) if kind is float and isinstance(value, int) else value
            if not isinstance(value, kind):
                problems.append(f"{where}: {key} must be {kind.__name__}, found {value!r}")
            settings[key] = value
    return settings


def _dataset(config: Config, entry: dict[str, Any]) -> EvalDataset:
    evaluation, rollout, data = config[Evaluation], config[Rollout], config[Data]
    form = PromptFormat(
        input_key=entry.get("input_key", evaluation.eval_input_key),
        label_key=entry.get("label_key", evaluation.eval_label_key),
        metadata_key=entry.get("metadata_key", data.metadata_key),
        tool_key=entry.get("tool_key", evaluation.eval_tool_key),
        apply_chat_template=data.apply_chat_template,
        chat_template_kwargs=data.apply_chat_template_kwargs,
        multimodal_keys=data.multimodal_keys or {},
    )
    settings = SamplingSettings(
        temperature=entry.get("temperature", evaluation.eval_temperature),
        top_p=entry.get("top_p", evaluation.eval_top_p),
        top_k=entry.get("top_k", evaluation.eval_top_k),
        max_response_len=entry.get("max_response_len", evaluation.eval_max_response_len),
        min_new_tokens=entry.get("min_new_tokens", evaluation.eval_min_new_tokens or 0),
        stop=tuple(entry.get("stop", rollout.rollout_stop or ())),
        stop_token_ids=tuple(entry.get("stop_token_ids", rollout.rollout_stop_token_ids or ())),
        skip_special_tokens=rollout.rollout_skip_special_tokens,
    )
    return EvalDataset(
        name=entry["name"],
        path=entry["path"],
        form=form,
        settings=settings,
        num_samples=entry.get("n_samples_per_eval_prompt", evaluation.n_samples_per_eval_prompt),
        max_prompt_len=evaluation.eval_max_prompt_len,
        rm_type=entry.get("rm_type"),
        generate_function_path=entry.get("custom_generate_function_path"),
        metadata_overrides=dict(entry.get("metadata_overrides", {})),
    )

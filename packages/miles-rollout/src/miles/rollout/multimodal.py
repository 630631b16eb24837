"""Images, videos and audio: from the columns of a row, through placeholders in the prompt, to the engine's request."""

from __future__ import annotations

import base64
import mimetypes
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles.core.flags.data import Data
from miles.rollout.flags import Engines

if TYPE_CHECKING:
    from miles.core.config import Config

Media = dict[str, list[str]]
"""``images``, ``videos``, ``audios``: addresses, paths of files, or data URLs."""

KINDS = ("image", "video", "audio")
_PLACEHOLDER = re.compile(r"<(image|video|audio)>")
_BYTES_TYPES = {"image": "image/png", "video": "video/mp4", "audio": "audio/wav"}


def read_media(row: Mapping[str, Any], keys: Mapping[str, str]) -> Media | None:
    """What the columns ``keys`` (kind to column) hold; None when nothing.  ValueError says what is wrong."""
    found: Media = {}
    for kind, column in keys.items():
        value = row.get(column)
        entries = [] if value is None else [value] if isinstance(value, str | bytes | Mapping) else list(value)
        if entries:
            found[f"{kind}s"] = [_address(entry, kind, column) for entry in entries]
    return found or None


def with_placeholders(messages: Sequence[Mapping[str, Any]], media: Media) -> list[dict[str, Any]]:
    """``messages`` whose ``<image>``, ``<video>`` and ``<audio>`` are parts of their own, as chat templates want them.

    ValueError when there are not as many as there are media.
    """
    counts = dict.fromkeys(KINDS, 0)

    def parts(text: str) -> list[dict[str, Any]]:
        made = []
        for place, piece in enumerate(_PLACEHOLDER.split(text)):
            if place % 2:
                counts[piece] += 1
                made.append({"type": piece})
            elif piece:
                made.append({"type": "text", "text": piece})
        return made

    written = [
        {**message, "content": parts(message["content"])}
        if isinstance(message.get("content"), str) and _PLACEHOLDER.search(message["content"])
        else dict(message)
        for message in messages
    ]
    for kind, count in counts.items():
        given = len(media.get(f"{kind}s", ()))
        if count != given:
            raise ValueError(f"the prompt has {count} <{kind}>, the row has {given}")
    return written


def request_fields(media: Media) -> dict[str, list[str]]:
    """``image_data``, ``video_data`` and ``audio_data`` of ``/generate``.  Files of this machine are sent as data."""
    return {f"{name.removesuffix('s')}_data": [_as_data(entry) for entry in entries] for name, entries in media.items()}


def check_multimodal(config: Config) -> Iterator[str]:
    """Media go where they can be used."""
    keys = config[Data].multimodal_keys
    if not keys:
        return
    for kind in keys:
        if kind not in KINDS:
            yield f"--multimodal-keys: {kind!r} is not a kind of media; there are {', '.join(KINDS)}"
    if config[Engines].rollout_num_engines and config[Engines].rollout_engine == "embedded":
        yield "--multimodal-keys: the embedded engine serves text models; take --rollout-engine sglang"
    if not config.debug_rollout_only:
        yield (
            "--multimodal-keys: the trainers take text only, so what a model saw would be missing from its training. "
            "Generate and evaluate with --debug-rollout-only"
        )


CHECKS: tuple[Callable[[Config], Iterator[str]], ...] = (check_multimodal,)


def _address(entry: Any, kind: str, column: str) -> str:
    """Text as it stands; bytes, or a mapping with ``bytes`` or ``path`` as Hugging Face's data sets have, as text."""
    if isinstance(entry, Mapping):
        entry = entry.get("bytes") or entry.get("path") or entry.get("url")
    if isinstance(entry, bytes):
        return _data_url(entry, _BYTES_TYPES[kind])
    if not isinstance(entry, str):
        raise ValueError(
            f"--multimodal-keys: {column!r} must hold addresses, paths or bytes, found {type(entry).__name__}"
        )
    return entry


def _as_data(entry: str) -> str:
    if entry.startswith(("http://", "https://", "data:")) or not Path(entry).is_file():
        return entry
    return _data_url(Path(entry).read_bytes(), mimetypes.guess_type(entry)[0] or "application/octet-stream")


def _data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"

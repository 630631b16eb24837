"""Whether engines add an adapter to their model themselves, or get whole weights with the adapter added."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from miles.core.errors import ConfigError
from miles.core.flags.lora import Lora
from miles.core.flags.training import Training
from miles.core.weights.adapter_form import AdapterForm
from miles.core.weights.shm import LOAD_FORMAT

if TYPE_CHECKING:
    from miles.core.config import Config

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
logger = logging.getLogger(__name__)


def served_form(config: Config, form: AdapterForm, facts: Mapping[str, Mapping[str, Any]]) -> AdapterForm | None:
    """``form`` when engines add the adapter themselves; None when they get whole weights.

    ``facts`` is what each engine tells of itself, by its address.  Raises ConfigError where ``--lora-serving adapter``
    asks for what an engine cannot.
    """
    flags, transport = config[Lora], config[Training].update_weight_transport
    if flags.lora_serving == "merged":
        return None
    found = (obstacle(form, url, fact, transport) for url, fact in facts.items())
    reason = next((each for each in found if each is not None), None)
    if flags.lora_serving == "adapter" and reason is not None:
        raise ConfigError(f"--lora-serving adapter: {reason}. Use --lora-serving merged, or leave it out")
    if flags.lora_serving == "auto" and config.rollout_external:
        reason = "engines of somebody else (--rollout-external) may hold another model than --hf-checkpoint"
    if reason is not None:
        logger.info("engines get whole weights with the adapter added: %s", reason)
        return None
    return form


def obstacle(form: AdapterForm, url: str, facts: Mapping[str, Any], transport: str = "auto") -> str | None:
    """Why the engine at ``url``, which tells these ``facts`` of itself, cannot add the adapter; None when it can."""
    served = facts.get("adapters") or _of_sglang(url, facts, transport)
    if served is None:
        return f"the engine at {url} adds no adapters: it takes whole weights only"
    limit = served.get("max_rank")
    if limit is not None and form.rank > limit:
        return f"the engine at {url} was started for adapters of rank {limit} at most, not {form.rank}"
    missing = _missing(form.layers, served)
    if missing:
        more = f" and {len(missing) - 1} more layers" if len(missing) > 1 else ""
        return f"the engine at {url} adds no adapter to {missing[0]}{more}"
    return None


def _of_sglang(url: str, facts: Mapping[str, Any], transport: str) -> dict[str, Any] | None:
    """What an SGLang server takes that Miles has started for adapters on the trainer's only machine."""
    shared = transport in ("auto", "shm") and urlsplit(url).hostname in _LOOPBACK
    if not shared or not facts.get("enable_lora") or LOAD_FORMAT not in (facts.get("custom_weight_loader") or ()):
        return None
    return {"max_rank": facts.get("max_lora_rank"), "modules": facts.get("lora_target_modules")}


def _missing(layers: Sequence[str], served: Mapping[str, Any]) -> list[str]:
    """Layers are told by their whole names, or for all decoder layers alike by the last part of their names."""
    names, modules = set(served.get("layers") or ()), set(served.get("modules") or ())
    return [layer for layer in layers if layer not in names and layer.rpartition(".")[2] not in modules]

"""What follows from the flags of the rollout side.  Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable

from miles.core import hardware
from miles.core.config.draft import Draft, Origin
from miles.core.registry import Registry

ENGINES = Registry("miles.engines")
SFT_ROLLOUT = "miles.rollout.sft_rollout.generate_rollout"
SFT_ROLLOUTS = (SFT_ROLLOUT, "sft")
"""Its dotted path, and its name."""


FULLY_ASYNC_ROLLOUTS = (
    "miles.rollout.fully_async_rollout.generate_rollout_fully_async",
    "fully_async_rollout.generate_rollout_fully_async",
    "fully_async",
)
"""The rollout function that generates all the time: its dotted path, and its names."""
BUFFER_ROLLOUT = "miles.rollout.buffer_rollout.generate_rollout"
OWN_ROLLOUTS = (
    *("miles.rollout.sglang_rollout.generate_rollout", "sglang", BUFFER_ROLLOUT, "buffer_service"),
    *SFT_ROLLOUTS,
)
"""The other rollout functions of this package."""


def derive_async(draft: Draft) -> None:
    """A rollout function that generates all the time trains asynchronously, whichever command was typed."""
    one_half = draft["debug_rollout_only"] or draft["debug_train_only"]
    if draft["rollout_function_path"] in FULLY_ASYNC_ROLLOUTS and not one_half:
        draft.derive("async_training", True, "the rollout function generates all the time")


def derive_functions(draft: Draft) -> None:
    """Responses may come from the data or from a buffer service; evaluation still generates."""
    if draft["rollout_buffer_url"]:
        generating = draft["rollout_function_path"]
        draft.derive("rollout_function_path", BUFFER_ROLLOUT, "--rollout-buffer-url: a service makes the rollouts")
        draft.derive("eval_function_path", generating, "evaluation generates, whatever makes the training samples")
    if draft["loss_type"] == "sft_loss":
        generating = draft["rollout_function_path"]
        draft.derive("rollout_function_path", SFT_ROLLOUT, "--loss-type sft_loss: the responses are in the data")
        draft.derive("eval_function_path", generating, "evaluation generates, whatever makes the training samples")


def derive_lengths(draft: Draft) -> None:
    """A prompt leaves room for one token of response."""
    context = draft["rollout_max_context_len"]
    if context is not None:
        draft.derive("rollout_max_prompt_len", context - 1, "--rollout-max-context-len - 1")


def derive_engines(draft: Draft) -> None:
    """Which engine, and how many."""
    if draft["rollout_engine"] == "auto":
        sglang = "sglang" in ENGINES
        if draft["sglang_python"] is not None:
            why = "--sglang-python says where SGLang is"
        elif sglang := sglang and draft["device"] == "cuda" and hardware.is_installed("sglang"):
            why = "SGLang is installed and the run uses an accelerator"
        else:
            why = "SGLang or an accelerator is missing"
        draft.set("rollout_engine", "sglang" if sglang else "embedded", Origin.DERIVED, why)
    if not generates(draft):
        draft.derive("rollout_num_engines", 0, "the run generates nothing")
    elif draft["rollout_external"]:
        count = len(draft["rollout_external_engine_addrs"] or ())
        draft.derive("rollout_num_engines", count, "the addresses of --rollout-external-engine-addrs")
    elif draft["rollout_num_gpus"]:
        engines = draft["rollout_num_gpus"] // draft["rollout_num_gpus_per_engine"]
        draft.derive("rollout_num_engines", engines, "--rollout-num-gpus // --rollout-num-gpus-per-engine")
    elif draft["device"] == "cpu":
        draft.derive("rollout_num_engines", 1, "--device cpu: one engine unless more are asked for")
    elif draft.typed("rollout_num_engines"):
        gpus = draft["rollout_num_engines"] * draft["rollout_num_gpus_per_engine"]
        draft.derive("rollout_num_gpus", gpus, "--rollout-num-engines x --rollout-num-gpus-per-engine")
    else:
        draft.derive("rollout_num_engines", 0, "neither --rollout-num-gpus nor --colocate was given")


def generates(draft: Draft) -> bool:
    """Whether a run needs engines: not when it trains on samples it has, and is not evaluated."""
    if draft["debug_train_only"]:
        return False
    return draft["rollout_function_path"] not in SFT_ROLLOUTS or draft["eval_interval"] is not None


def derive_sessions(draft: Draft) -> None:
    """An agent talks to a session of the router."""
    if draft["custom_agent_function_path"] is not None:
        draft.derive("use_session_server", True, "--custom-agent-function-path: agents talk to sessions")


DERIVATIONS: tuple[Callable[[Draft], None], ...] = (
    derive_sessions,
    derive_functions,
    derive_async,
    derive_lengths,
    derive_engines,
)

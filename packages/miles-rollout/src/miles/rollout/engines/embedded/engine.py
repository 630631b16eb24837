"""One checkpoint being served: what the endpoints do, without HTTP."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, get_args

from miles.rollout.engines.embedded.adapters import Adapters
from miles.rollout.engines.embedded.memory import available_memory
from miles.rollout.engines.embedded.model import Checkpoint, load_model
from miles.rollout.engines.embedded.occupation import MemoryOccupation
from miles.rollout.engines.embedded.protocol import BadRequest, GenerateItem, Unavailable
from miles.rollout.engines.embedded.runner import Runner
from miles.rollout.engines.embedded.scheduler import Limits, PauseMode, Scheduler
from miles.rollout.engines.embedded.sequence import Progress, Sequence
from miles.rollout.engines.embedded.text import StopMatcher, Text, visible
from miles.rollout.engines.embedded.weight_updates import WeightUpdates

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine is started."""

    model_path: str
    dtype: str = "auto"
    layer: str = "auto"
    seed: int = 0
    max_running_requests: int = 256
    context_length: int | None = None
    kv_bytes: int | None = None
    """Memory for keys and values; None: a quarter of what is available."""
    keep_experts: bool = False
    """Answer ``return_routed_experts``."""
    weight_version: str = "default"
    served_model_name: str | None = None


class Engine:
    """Model, tokenizer, scheduler and the thread that runs them.

    ``deliver`` is called on the model thread whenever a sequence has something to tell; the server hands it to its
    event loop.
    """

    def __init__(self, options: EngineOptions, on_failure: Callable[[], None]) -> None:
        self.options = options
        self.checkpoint = Checkpoint.open(options.model_path)
        dtype = self.checkpoint.dtype(options.dtype)
        self.model = load_model(self.checkpoint, dtype, options.layer, keep_experts=options.keep_experts)
        self.text = Text(self.checkpoint.path)
        self.context_length = options.context_length or self.checkpoint.context_length
        kv_bytes = options.kv_bytes or available_memory() // 4
        limits = Limits(
            max_running=options.max_running_requests,
            context_length=self.context_length,
            kv_tokens=kv_bytes // self.model.kv_shape.token_bytes,
        )
        self.scheduler = Scheduler(self.model, limits, options.weight_version)
        self.runner = Runner(self.scheduler, on_failure)
        self.adapters = Adapters(self.model.adapter_places, self.model.weights, self.checkpoint.path)
        self.updates = WeightUpdates(self.runner, self.model.weights, self.adapters, options.model_path)
        self.memory = MemoryOccupation(self.runner, self.model)
        self._eos = {*self.checkpoint.eos_token_ids, *([self.text.eos_token_id] if self.text.eos_token_id else [])}
        self._numbers = itertools.count()

    @property
    def name(self) -> str:
        """Name under which the model is served."""
        return self.options.served_model_name or self.options.model_path

    # -- generation ----------------------------------------------------------------------------------------------

    def prepare(
        self, item: GenerateItem, notify: Callable[[Progress], None], *, stream: bool = False
    ) -> list[Sequence]:
        """The sequences of one prompt, ready for ``submit``; raise BadRequest when it cannot be served."""
        prompt = item.input_ids if item.input_ids is not None else self.text.encode(item.text or "")
        if problem := self.memory.problem(self.scheduler):
            raise Unavailable(problem)
        self._check_length(prompt, item)
        self._check_experts(item)
        params = item.params
        number = next(self._numbers)
        base = params.sampling_seed if params.sampling_seed is not None else (self.options.seed << 40) + number
        rid = item.rid or f"{number:x}"
        eos = () if params.ignore_eos else self._eos
        start = item.logprob_start_len
        return [
            Sequence(
                rid=rid if params.n == 1 else f"{rid}_{choice}",
                prompt=prompt,
                params=params,
                seed=(base + choice * _GOLDEN) & _MASK,
                stop_ids=tuple(dict.fromkeys((*eos, *params.stop_token_ids))),
                notify=notify,
                stream=stream,
                num_top_logps=item.top_logprobs_num if item.return_logprob else 0,
                score_from=start if item.return_logprob and 0 <= start < len(prompt) else None,
                matches_stop=StopMatcher(self.text, params.stop, params.skip_special_tokens) if params.stop else None,
                wants_experts=item.return_routed_experts,
            )
            for choice in range(params.n)
        ]

    def submit(self, sequences: Seq[Sequence]) -> None:
        """Queue sequences."""

        def add() -> None:
            for sequence in sequences:
                self.scheduler.add(sequence)

        self.runner.post(add)

    def abort(self, rid: str | None) -> Future[int]:
        """End the request ``rid`` (and its choices), or all when None."""

        def matches(sequence: Sequence) -> bool:
            return rid is None or sequence.rid == rid or sequence.rid.startswith(f"{rid}_")

        return self.runner.call(lambda scheduler: scheduler.abort(matches))

    def withdraw(self, sequences: Seq[Sequence]) -> None:
        """End sequences that nobody waits for any more."""
        gone = set(sequences)
        self.runner.post(lambda: self.scheduler.abort(lambda sequence: sequence in gone, "the client went away"))

    def response_text(self, progress: Progress) -> str | None:
        """Text of a response; None when the checkpoint has no tokenizer."""
        if not self.text.available:
            return None
        params = progress.sequence.params
        tokens = progress.tokens
        matched = (progress.finish or {}).get("matched")
        if isinstance(matched, int) and not params.no_stop_trim:
            tokens = tokens[:-1]
        return visible(self.text.decode(tokens, params.skip_special_tokens), progress.finish, params.no_stop_trim)

    def _check_length(self, prompt: list[int], item: GenerateItem) -> None:
        if not prompt:
            raise BadRequest("the prompt is empty")
        vocabulary = self.model.vocab_size
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise BadRequest(f"input_ids must be in [0, {vocabulary}); found {min(prompt)} to {max(prompt)}")
        if any(not 0 <= token < vocabulary for token in item.params.stop_token_ids):
            raise BadRequest(f"stop_token_ids must be in [0, {vocabulary}); got {list(item.params.stop_token_ids)}")
        if item.logprob_start_len > len(prompt):
            raise BadRequest(f"logprob_start_len is {item.logprob_start_len}; the prompt has {len(prompt)} tokens")
        total = len(prompt) + item.params.max_new_tokens
        if total > self.context_length:
            raise BadRequest(
                f"{len(prompt)} prompt tokens and max_new_tokens={item.params.max_new_tokens} make {total}; "
                f"the model's context is {self.context_length} tokens"
            )
        if not self.scheduler.kv.fits_alone(total):
            raise BadRequest(
                f"{total} tokens do not fit the engine's memory for keys and values "
                f"({self.scheduler.kv.budget_tokens} tokens); start it with a larger --kv-cache-bytes"
            )

    def _check_experts(self, item: GenerateItem) -> None:
        if item.return_routed_experts and not self.options.keep_experts:
            raise BadRequest(
                "return_routed_experts: this engine does not keep them; start it with --enable-return-routed-experts"
            )

    # -- pausing -------------------------------------------------------------------------------------------------

    def pause(self, body: dict[str, Any]) -> Future[None]:
        """``/pause_generation``"""
        mode: PauseMode = body.get("mode", "abort")
        if mode not in get_args(PauseMode):
            raise BadRequest(f"mode is {mode!r}; it must be one of {', '.join(get_args(PauseMode))}")
        return self.runner.call(lambda scheduler: scheduler.pause(mode))

    def resume(self) -> Future[None]:
        """``/continue_generation``"""
        return self.runner.call(lambda scheduler: scheduler.resume())

    def flush(self) -> Future[bool]:
        """Give the memory of the caches back; False while sequences run."""

        def flush(scheduler: Scheduler) -> bool:
            if scheduler.running():
                return False
            scheduler.weights_changed()
            scheduler.kv.trim()
            return True

        return self.runner.call(flush)

    # -- facts ---------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What an operator may want to know."""
        scheduler = self.scheduler
        return {
            **asdict(self.options),
            "engine": "miles-embedded",
            "layer": self.model.kind,
            "batch_invariant": self.model.batch_invariant,
            "context_length": self.context_length,
            "kv_budget_tokens": scheduler.kv.budget_tokens,
            "kv_allocated_tokens": scheduler.kv.allocated_tokens,
            "num_running": len(scheduler.running()),
            "num_waiting": len(scheduler.waiting),
            "paused": scheduler.paused,
            "released": sorted(scheduler.released),
            "weight_version": scheduler.version,
            "weight_delta": True,
            "follows_shared_ring": True,
            "adapters": self.adapters.facts(),
            **asdict(scheduler.counters),
        }

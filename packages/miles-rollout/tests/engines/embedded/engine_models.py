"""Tiny models with random weights, and an engine's scheduler driven by hand."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from miles.rollout.engines.embedded.model import Checkpoint, Model, load_model
from miles.rollout.engines.embedded.sampling import SamplingParams
from miles.rollout.engines.embedded.scheduler import Limits, Scheduler
from miles.rollout.engines.embedded.sequence import Progress, Sequence

VOCABULARY = 331
CONTEXT = 1024
EOS = 2
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,  # spreads the probabilities, so that a wrong one shows
    "eos_token_id": EOS,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3-tied": lambda: Qwen3ForCausalLM(
        Qwen3Config(**_SHAPE, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
    ),
    "qwen3-untied": lambda: Qwen3ForCausalLM(
        Qwen3Config(**_SHAPE, num_key_value_heads=1, head_dim=24, tie_word_embeddings=False)
    ),
    "qwen3-wide": lambda: Qwen3ForCausalLM(  # large enough for weights to be laid out for the processor
        Qwen3Config(
            **{**_SHAPE, "hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.08},
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=True,
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SHAPE, num_key_value_heads=2, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE, num_key_value_heads=4)),
    "llama3-biased": lambda: LlamaForCausalLM(
        LlamaConfig(**_SHAPE, num_key_value_heads=2, attention_bias=True, rope_parameters=_LLAMA3)
    ),
    "llama-linear": lambda: LlamaForCausalLM(
        LlamaConfig(
            **_SHAPE, num_key_value_heads=2, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        )
    ),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **{**_SHAPE, "num_hidden_layers": 3},
            num_key_value_heads=2,
            head_dim=16,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            norm_topk_prob=True,
            mlp_only_layers=[1],
        )
    ),
    "qwen3-moe-throughout": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_SHAPE,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            norm_topk_prob=True,
        )
    ),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_SHAPE)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_SHAPE, num_key_value_heads=2, head_dim=16, sliding_window=8, query_pre_attn_scalar=16)
    ),
}
FAST = ("qwen3-moe", "qwen3-wide", "qwen3-tied", "qwen3-untied", "qwen2", "llama", "llama3-biased", "llama-linear")
GENERAL = ("gpt-neox", "gpt2", "gemma2")


def save_model(name: str, directory: Path) -> Path:
    """Write one of MODELS; biases and norms get values too, which a fresh model has not."""
    torch.manual_seed(len(name))
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


def load(path: Path, dtype: torch.dtype = torch.float32, kind: str = "auto") -> Model:
    return load_model(Checkpoint.open(str(path)), dtype, kind)


@dataclass(frozen=True)
class Ask:
    """One request."""

    prompt: list[int]
    params: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Driver:
    """A scheduler, stepped by hand."""

    model: Model
    limits: Limits = field(default_factory=lambda: Limits(context_length=CONTEXT, kv_tokens=1 << 16))
    finals: dict[int, Progress] = field(default_factory=dict)
    sequences: dict[int, Sequence] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.model, self.limits)

    def add(self, asks: Seq[Ask]) -> None:
        """Queue requests; their results appear in ``finals`` under their number."""
        for ask in asks:
            number = len(self.sequences)

            def notify(progress: Progress, number: int = number) -> None:
                if progress.finish is not None:
                    self.finals[number] = progress

            self.sequences[number] = Sequence(
                rid=str(number),
                prompt=ask.prompt,
                params=SamplingParams(**ask.params),
                seed=ask.seed,
                stop_ids=ask.stop_ids,
                **{"notify": notify, **ask.options},
            )
            self.scheduler.add(self.sequences[number])

    def run(self, steps: int = 10_000) -> list[Progress]:
        """Step until nothing is left, or ``steps`` times; return what has ended, in order of asking."""
        for _ in range(steps):
            if self.scheduler.idle:
                break
            self.scheduler.step()
        return [self.finals[number] for number in sorted(self.finals)]

    def assert_empty(self) -> None:
        """Nothing is held for requests that have ended."""
        scheduler = self.scheduler
        assert not scheduler.waiting
        assert not scheduler.running()
        assert sorted(scheduler.seats.free) == list(range(self.limits.max_running))
        assert scheduler._prefixes._sources == {}
        assert scheduler._prefixes._states == {}


def generate(model: Model, asks: Seq[Ask], **limits: Any) -> list[Progress]:
    """Results of ``asks``, run together."""
    driver = Driver(model, Limits(**{"context_length": CONTEXT, "kv_tokens": 1 << 16, **limits}))
    driver.add(asks)
    results = driver.run()
    driver.assert_empty()
    return results


def random_asks(count: int, seed: int = 0, longest_prompt: int = 70, longest_output: int = 60) -> list[Ask]:
    """Requests of every kind, some with equal prompts."""
    draw = random.Random(seed)
    asks: list[Ask] = []
    for number in range(count):
        prompt = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, longest_prompt))]
        if asks and draw.random() < 0.3:
            prompt = draw.choice(asks).prompt
        params = {
            "max_new_tokens": draw.randint(1, longest_output),
            "temperature": draw.choice([0.0, 0.7, 1.0]),
            "top_p": draw.choice([1.0, 0.9]),
            "top_k": draw.choice([-1, 30]),
        }
        asks.append(Ask(prompt, params, seed=number))
    return asks


def bits(progress: Progress) -> tuple[list[int], list[float]]:
    """What must not change by a bit."""
    return progress.tokens, progress.logps

"""The experts that an engine chose for each token (R3), from the wire to a sample."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import AutoConfig

from miles.core.errors import ConfigError, EngineError

Experts = npt.NDArray[np.int32]
"""[tokens - 1, layers, experts per token]: the last token of a sequence is never computed."""


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """What one token's row holds.  ``layers`` counts all decoder layers; the rows of dense ones mean nothing."""

    layers: int
    per_token: int

    @classmethod
    def of_checkpoint(cls, path: str) -> ExpertShape:
        """Of a Hugging Face checkpoint; ConfigError when its model has no experts."""
        config = AutoConfig.from_pretrained(path, trust_remote_code=True).get_text_config()
        per_token = getattr(config, "num_experts_per_tok", None)
        if not per_token:
            raise ConfigError(
                f"--use-rollout-routing-replay: {type(config).__name__} of --hf-checkpoint {path} says no "
                "num_experts_per_tok; there is no routing to replay in a dense model"
            )
        return cls(config.num_hidden_layers, per_token)

    def decode(self, data: str | None, num_tokens: int) -> Experts:
        """``meta_info.routed_experts`` of a sequence of ``num_tokens``: base64 of little-endian int32.

        A row for the last token is left out; any other length raises EngineError.
        """
        if data is None:
            raise EngineError(
                "the engine answered without routed_experts though return_routed_experts was set; it must be started "
                "with enable_return_routed_experts"
            )
        try:
            flat = np.frombuffer(base64.b64decode(data, validate=True), np.dtype("<i4"))
        except (binascii.Error, ValueError) as error:
            raise EngineError(f"routed_experts of the engine are not base64 of int32: {error}") from error
        rows, rest = divmod(flat.size, self.layers * self.per_token)
        if rest or rows not in (num_tokens - 1, num_tokens):
            raise EngineError(
                f"the engine returned {flat.size} routed experts for {num_tokens} tokens, expected "
                f"{num_tokens - 1} x {self.layers} layers x {self.per_token}"
            )
        return flat.reshape(rows, self.layers, self.per_token)[: num_tokens - 1].astype(np.int32)

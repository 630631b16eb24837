"""The model of a run on this rank: its chunks, with the checkpoint's weights in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from miles.core.errors import ConfigError
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.checkpoint import Checkpoint
from miles.core.flags.lora import Lora
from miles.core.flags.training import Training
from miles.core.protocols.backend import Role
from miles.core.training.value_head import new_value_head
from miles.core.weights.adapters import LoraSpec
from miles.megatron import checkpoint, local_modules
from miles.megatron.architecture_flags import checked
from miles.megatron.constants import model_map, padded_rows, read_hf_config, transformer_config
from miles.megatron.conversion import load_weights, mark_parts
from miles.megatron.flags import Mtp
from miles.megatron.hf_files import HfTensors
from miles.megatron.language_model import Head, LanguageModel
from miles.megatron.layer_specs import decoder_spec, mtp_spec
from miles.megatron.lora import Adapters
from miles.megatron.model_map import Architecture, WeightMap
from miles.megatron.provider import Provider, layer_spec
from miles.megatron.site import Site
from miles.megatron.value import CriticTensors, ValueHead, critic_weights

if TYPE_CHECKING:
    from miles.core.config import Config


@dataclass(frozen=True, slots=True)
class Blueprint:
    """All that is known of a model before it is built."""

    architecture: Architecture
    transformer: TransformerConfig
    weights: WeightMap
    padded: int
    """Rows of embedding and head over all ranks."""
    role: Role
    seed: int
    trains_mtp: bool
    """Whether layers of multi-token prediction learn."""
    layer_spec: Callable[[TransformerConfig, int | None], Any] | None = None
    """Layers of the user's own."""
    provider: Provider | None = None

    @classmethod
    def of(cls, config: Config, site: Site, directory: Path, role: Role = "actor") -> Blueprint:
        """From the ``config.json`` of ``directory`` and the flags."""
        hf = read_hf_config(directory)
        family = model_map(hf, config[Checkpoint].model_name)
        architecture = checked(family.architecture(hf), config)
        padded = padded_rows(config, architecture)
        weights = family.weights(hf, padded)
        return cls(
            architecture=architecture,
            transformer=transformer_config(config, site, architecture, role),
            weights=critic_weights(weights) if role == "critic" else weights,
            padded=padded,
            role=role,
            seed=config[Algorithm].seed,
            trains_mtp=config[Mtp].enable_mtp_training,
            layer_spec=layer_spec(config),
            provider=Provider.of(config),
        )

    def build(self) -> list[LanguageModel]:
        """This rank's chunks, one per virtual stage, without their weights."""
        local_modules.install()
        parts = self.transformer.virtual_pipeline_model_parallel_size
        return [self._chunk(None)] if parts is None else [self._chunk(part) for part in range(parts)]

    def _chunk(self, part: int | None) -> LanguageModel:
        whole = {"ignore_virtual": part is None, "vp_stage": part}
        first, last = parallel_state.is_pipeline_first_stage(**whole), parallel_state.is_pipeline_last_stage(**whole)
        if self.provider is None:
            chunk = self._own_chunk(first, last, part)
        else:
            chunk = self.provider.model(first, last, part, self._own_chunk)
        if self.role == "critic" and chunk.post_process:
            chunk.output_layer = ValueHead(self.transformer.hidden_size, chunk.output_layer.weight.device)
            chunk.share_embeddings_and_output_weights = False
        if chunk.mtp_process and not self.trains_mtp:
            chunk.mtp.requires_grad_(False)
        chunk.train()
        return chunk

    def _own_chunk(self, pre_process: bool, post_process: bool, part: int | None) -> LanguageModel:
        own_spec = self.layer_spec
        decoder = (
            decoder_spec(self.transformer, self.architecture, part)
            if own_spec is None
            else own_spec(self.transformer, part)
        )
        return LanguageModel(
            config=self.transformer,
            transformer_layer_spec=decoder,
            mtp_block_spec=mtp_spec(self.transformer, decoder, part),
            vocab_size=self.padded,
            max_sequence_length=self.architecture.max_positions,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=self.architecture.tied and self.role == "actor",
            position_embedding_type="rope" if self.architecture.yarn is None else "yarn",
            vp_stage=part,
            **self.architecture.rotary,
        )

    def adapters(self, config: Config, chunks: list[LanguageModel]) -> Adapters | None:
        """Give ``chunks`` the adapters that the flags ask for.  Collective."""
        spec = LoraSpec.of(config[Lora], self.seed)
        if spec is None:
            return None
        if self.architecture.latent_attention:
            raise ConfigError(
                "--lora-rank: the megatron backend trains no adapters on latent attention. Leave it out, or use "
                "--train-backend fsdp"
            )
        return Adapters(chunks, self.weights, spec)

    def load(self, chunks: list[LanguageModel], directory: Path, step: int | None = None) -> None:
        """Give the chunks the weights of the checkpoint in ``directory``: Hugging Face's format, or ``torch_dist``.

        ``step`` chooses among the checkpoints of a run.
        """
        mark_parts(chunks, self.weights)
        if not checkpoint.is_torch_dist(directory):
            load_weights(chunks, self.weights, self._tensors(directory))
            return
        is_critic = self.role == "critic"
        checkpoint.read_weights(checkpoint.resolve(directory, step), chunks, with_head=not is_critic)
        if is_critic:
            self._start_value_head(chunks)

    def _start_value_head(self, chunks: list[LanguageModel]) -> None:
        """A new one, which the seed determines."""
        for chunk in chunks:
            if isinstance(chunk.output_layer, ValueHead):
                chunk.output_layer.load_state_dict(new_value_head(self.transformer.hidden_size, self.seed))

    def _tensors(self, directory: Path) -> HfTensors:
        if self.role == "critic":
            return CriticTensors(directory, self.transformer.hidden_size, self.seed)
        return HfTensors(directory)

    def head(self, config: Config, *, temperature: float | None = None) -> Head:
        """What turns hidden states into log-probabilities, at the temperature of sampling unless one is given."""
        chunk_size = config[Training].log_probs_chunk_size
        return Head(
            vocab_size=self.architecture.vocab_size,
            padded=self.padded,
            temperature=config.rollout_temperature if temperature is None else temperature,
            chunk_size=chunk_size if chunk_size > 0 else None,
        )

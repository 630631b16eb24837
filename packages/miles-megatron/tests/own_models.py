"""A model and layers as users bring them."""

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

from miles.megatron import provider

calls = []


class Own(GPTModel):
    """Remembers that it was run."""

    def forward(self, *args, **kwargs):
        calls.append(type(self).__name__)
        return super().forward(*args, **kwargs)


def frozen_embedding(pre_process, post_process, vp_stage=None):
    """The model as it would be, without learning of its embedding."""
    model = provider.default_model(pre_process, post_process, vp_stage)
    if pre_process:
        model.embedding.requires_grad_(False)
    return model


def from_scratch(pre_process, post_process):
    """A subclass of Megatron-Core's model."""
    default = provider.default_model(pre_process, post_process)
    return Own(
        config=default.config,
        transformer_layer_spec=default.transformer_layer_spec,
        vocab_size=default.vocab_size,
        max_sequence_length=default.max_sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type="rope",
        rotary_base=default.rotary_base,
    )


def something_else(pre_process, post_process):
    return object()


def spec(args, config, vp_stage):
    """Megatron-Core's own, and a note of the call."""
    calls.append((args.train_backend, config.num_layers, vp_stage))
    return get_gpt_decoder_block_spec(config, True, vp_stage=vp_stage)

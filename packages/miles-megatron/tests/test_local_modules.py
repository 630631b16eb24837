"""Which layers a model is built from."""

import logging

import pytest
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer import multi_latent_attention

from miles.megatron import local_modules


class TheirLayers:
    """Stands for Transformer Engine's."""


@pytest.fixture
def transformer_engine(monkeypatch):
    """``transformer_engine(installed)``: as Megatron-Core finds it."""

    def find(installed):
        monkeypatch.setattr(gpt_layer_specs, "HAVE_TE", installed)
        for module, name in (
            (gpt_layer_specs, "TESpecProvider"),
            (gpt_layer_specs, "TENorm"),
            (multi_latent_attention, "TELinear"),
        ):
            monkeypatch.setattr(module, name, TheirLayers, raising=False)

    return find


def test_transformer_engine_is_used_where_it_is(transformer_engine, caplog):
    transformer_engine(installed=True)
    with caplog.at_level(logging.INFO):
        local_modules.install()
    assert gpt_layer_specs.TESpecProvider is gpt_layer_specs.TENorm is TheirLayers
    assert multi_latent_attention.TELinear is TheirLayers
    assert "layers of Transformer Engine" in caplog.text


def test_local_layers_take_its_places_where_it_is_not(transformer_engine, caplog):
    transformer_engine(installed=False)
    with caplog.at_level(logging.INFO):
        local_modules.install()
    assert gpt_layer_specs.TESpecProvider is local_modules.LocalSpecProvider
    assert gpt_layer_specs.TENorm is local_modules.Norm
    assert multi_latent_attention.TELinear is local_modules.DuplicatedLinear
    assert "Transformer Engine is not installed" in caplog.text

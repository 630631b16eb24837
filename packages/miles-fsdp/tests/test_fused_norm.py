"""Norms in one step: the same numbers as written out, where a norm is one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from miles.fsdp.fused_norm import RmsNorm, fuse_norms

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 40, "head_dim": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_gradients_are_those_of_the_formula():
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: RmsNorm.apply(x, weight, 1e-6), (x, weight))


def test_a_frozen_weight_gets_no_gradient():
    x, weight = torch.randn(3, 5, requires_grad=True), torch.ones(5)
    RmsNorm.apply(x, weight, 1e-6).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_a_model_computes_the_same():
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, **HEADS))
    ids = torch.arange(12)[None]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    written_out = gradients()
    assert fuse_norms(model) == 2 * 4 + 1
    for one, other in zip(gradients(), written_out, strict=True):
        torch.testing.assert_close(one, other)


def test_a_model_without_storage_is_fused_too():
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, **HEADS))
    assert fuse_norms(model) == 2 * 4 + 1
    assert next(model.parameters()).is_meta


def test_norms_of_another_formula_stay_as_they_are():
    norm = Gemma2RMSNorm(4)
    assert fuse_norms(nn.Sequential(norm)) == 0
    assert fuse_norms(Gemma2ForCausalLM(Gemma2Config(**SHAPE, **HEADS))) == 0


@pytest.mark.parametrize("norm", [BambaRMSNormGated(4, group_size=4), Qwen3NextRMSNormGated(4)])
def test_norms_with_a_gate_stay_as_they_are(norm):
    x, gate = torch.randn(3, 4), torch.randn(3, 4)
    before = norm(x, gate)
    assert fuse_norms(nn.Sequential(norm)) == 0
    assert torch.equal(norm(x, gate), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_left_to_the_model(dtype):
    norm = LlamaRMSNorm(4).to(dtype)
    x = torch.randn(3, 4, dtype=dtype)
    before = norm(x)
    assert fuse_norms(nn.Sequential(norm)) == 1
    assert torch.equal(norm(x), before)

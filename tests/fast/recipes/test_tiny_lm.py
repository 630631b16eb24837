import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_lm
from tiny_lm import Shape, create_model, save_checkpoint, train_tokenizer

TEXTS = ["Calculate 814 + 707.", "<think>4+7+0=11 1+0+1=02</think>1521"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=400)


def pieces(tokenizer, text):
    return [tokenizer.decode([token]) for token in tokenizer.encode(text)]


def test_digits_and_thinking_marks_are_tokens_of_their_own(tokenizer):
    assert pieces(tokenizer, "<think>12+30</think>42") == ["<think>", "1", "2", "+", "3", "0", "</think>", "4", "2"]


def test_thinking_marks_stay_when_special_tokens_are_skipped(tokenizer):
    ids = tokenizer.encode("<think></think>42<|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think></think>42"


def test_any_text_survives(tokenizer):
    text = "naïve — 数学 🙂\n\ttab"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_turns_follow_chatml(tokenizer):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert prompt.endswith("<|im_start|>assistant\n")


def test_the_same_seed_makes_the_same_weights(tokenizer):
    first, again, other = (create_model(tokenizer, Shape(), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_a_checkpoint_loads_like_any_other(tmp_path):
    count = save_checkpoint(tmp_path, TEXTS, vocab_size=400, shape=Shape(hidden=32, mlp=64), seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.architectures == ["Qwen3ForCausalLM"]
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(tiny_lm.END_OF_TURN)
    assert tokenizer.chat_template == tiny_lm.CHAT_TEMPLATE

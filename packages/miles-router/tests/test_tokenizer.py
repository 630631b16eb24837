"""The tokenizer of a checkpoint."""

from __future__ import annotations

import pytest
from chat_templates import write_checkpoint

from miles.core.errors import ConfigError
from miles.router.tokenizer import CheckpointTokenizer


@pytest.fixture
def tokenizer(checkpoint):
    return CheckpointTokenizer(checkpoint("chatml"))


def test_text_survives(tokenizer):
    text = "the user <|im_start|> äé日本\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_known(tokenizer):
    (end,) = tokenizer.encode("<|im_end|>")
    assert end in tokenizer.special_ids
    assert tokenizer.encode("<tool_call>")[0] not in tokenizer.special_ids
    assert tokenizer.without_specials("a<|im_end|>b<tool_call>") == "ab<tool_call>"


def test_characters_of_several_tokens_are_decoded_where_they_end(tokenizer):
    ids = tokenizer.encode("x日")
    assert tokenizer.decode_after(ids[:2], ids[2:]) == tokenizer.decode(
        ids[2:]
    )  # no beginning of a text that it could continue
    assert tokenizer.decode_after(ids[:1], ids[1:]) == "日"
    assert tokenizer.decode_after([], ids) == "x日"


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such directory"):
        CheckpointTokenizer(tmp_path / "none")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"expected a tokenizer\.json in it \(\['config\.json'\]\)"):
        CheckpointTokenizer(tmp_path)


def test_broken_files_are_named(tmp_path):
    folder = write_checkpoint(tmp_path, "chatml")
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must be a JSON object"):
        CheckpointTokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        CheckpointTokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        CheckpointTokenizer(folder)


def test_settings_are_optional(tmp_path):
    folder = write_checkpoint(tmp_path, "chatml")
    (folder / "tokenizer_config.json").unlink()
    assert CheckpointTokenizer(folder).settings == {}

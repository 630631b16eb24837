from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Qwen3Config, Qwen3MoeConfig

from miles.core.errors import ConfigError, EngineError
from miles.core.types.sample import Sample
from miles.rollout.convert import to_batch
from miles.rollout.generators.experts import ExpertShape
from miles.rollout.generators.response import append_response

SHAPE = ExpertShape(layers=3, per_token=2)


def rows(count: int, start: int = 0) -> Any:
    return (start + np.arange(count * 6)).astype("<i4").reshape(count, 3, 2)


def encoded(array: Any) -> str:
    return base64.b64encode(array.tobytes()).decode()


def answer(num_tokens: int, experts: str | None) -> dict[str, Any]:
    scored = [[-0.5, 7, None]] * num_tokens
    meta = {"output_token_logprobs": scored, "finish_reason": {"type": "stop"}, "routed_experts": experts}
    return {"text": "x" * num_tokens, "meta_info": meta}


def test_a_row_for_each_token_but_the_last() -> None:
    np.testing.assert_array_equal(SHAPE.decode(encoded(rows(4)), 5), rows(4))


def test_a_row_for_the_last_token_is_left_out() -> None:
    np.testing.assert_array_equal(SHAPE.decode(encoded(rows(5)), 5), rows(4))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encoded(rows(3)), "18 routed experts for 5 tokens, expected 4 x 3 layers x 2"),
        (encoded(rows(4).ravel()[:-1]), "23 routed experts"),
        ("%%%", "not base64"),
        (None, "enable_return_routed_experts"),
    ],
)
def test_anything_else_is_an_error(data: str | None, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        SHAPE.decode(data, 5)


def test_a_later_answer_covers_all_tokens_and_replaces_the_earlier(tmp_path: Path) -> None:
    sample = Sample(index=0, group_index=0, tokens=[1, 2, 3])
    append_response(sample, answer(2, encoded(rows(4))), SHAPE)
    append_response(sample, answer(1, encoded(rows(5, start=100))), SHAPE)
    assert sample.rollout_routed_experts is not None
    np.testing.assert_array_equal(sample.rollout_routed_experts, rows(5, start=100))
    column = to_batch(0, [sample], [1.0], [1.0]).routed_experts
    assert column is not None
    np.testing.assert_array_equal(column[0], rows(5, start=100))
    assert column[0].dtype == np.int32


def test_an_abort_before_the_first_token_needs_no_experts() -> None:
    sample = Sample(tokens=[1, 2, 3])
    append_response(sample, answer(0, None), SHAPE)
    assert sample.rollout_routed_experts is None


def test_the_shape_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    Qwen3MoeConfig(num_hidden_layers=3, num_experts=4, num_experts_per_tok=2).save_pretrained(tmp_path)
    assert ExpertShape.of_checkpoint(str(tmp_path)) == SHAPE


def test_a_dense_model_has_no_routing_to_replay(tmp_path: Path) -> None:
    Qwen3Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no routing to replay"):
        ExpertShape.of_checkpoint(str(tmp_path))

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from miles.core.errors import ConfigError, DataError
from miles.core.types.rollout import RolloutFnTrainOutput
from miles.core.types.sample import Group, Sample, Status
from miles.rollout.sft_rollout import generate_rollout
from miles.rollout.text import ChatTokenizer

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


class Source:
    def __init__(self, *groups: Group) -> None:
        self._groups = list(groups)

    def get_samples(self, num_samples: int) -> list[Group]:
        return self._groups[:num_samples]


def run(checkpoint: str, *groups: Group, **values: Any) -> list[Sample]:
    args = SimpleNamespace(
        hf_checkpoint=checkpoint,
        loss_mask_type="qwen",
        rollout_batch_size=len(groups),
        rollout_max_context_len=None,
    )
    vars(args).update(values)
    output = generate_rollout(args, 0, Source(*groups))  # type: ignore[arg-type]
    assert isinstance(output, RolloutFnTrainOutput)
    return [sample for group in output.samples for sample in group]


def test_messages_become_tokens_and_a_mask(checkpoint: str, tokenizer: ChatTokenizer) -> None:
    (sample,) = run(checkpoint, [Sample(prompt=[*TALK, {"role": "user", "content": "r"}, TALK[1]])])
    sample.validate()
    assert sample.tokens == tokenizer.encode(tokenizer.render(sample.prompt, add_generation_prompt=False))  # type: ignore[arg-type]
    trained = [token for token, trains in zip(sample.response_tokens, sample.loss_mask or [], strict=True) if trains]
    assert tokenizer.hf.decode(trained) == "a<|im_end|>\na<|im_end|>\n"
    assert (sample.loss_mask or [])[0] == 1
    assert sample.status is Status.COMPLETED


def test_a_prompt_and_its_label_are_a_question_and_its_answer(checkpoint: str) -> None:
    by_label, by_messages = run(checkpoint, [Sample(prompt="q", label="a")], [Sample(prompt=TALK)])
    assert by_label.tokens == by_messages.tokens
    assert by_label.loss_mask == by_messages.loss_mask


def test_long_conversations_are_cut_and_say_so(checkpoint: str) -> None:
    (whole,) = run(checkpoint, [Sample(prompt="q", label="a" * 20)])
    (cut,) = run(checkpoint, [Sample(prompt="q", label="a" * 20)], rollout_max_context_len=len(whole.tokens) - 5)
    assert cut.tokens == whole.tokens[:-5]
    assert cut.status is Status.TRUNCATED
    with pytest.raises(DataError, match="no token of an assistant within --rollout-max-context-len"):
        run(checkpoint, [Sample(prompt="q", label="a")], rollout_max_context_len=3)


def test_a_conversation_without_an_answer_is_refused(checkpoint: str) -> None:
    with pytest.raises(DataError, match=r"needs messages that end with the assistant's.*found NoneType"):
        run(checkpoint, [Sample(prompt="q")])


def test_groups_of_several_are_refused(checkpoint: str) -> None:
    with pytest.raises(ConfigError, match="--n-samples-per-prompt 2"):
        run(checkpoint, [Sample(prompt="q", label="a"), Sample(prompt="q", label="a")])


def test_there_is_no_evaluation(checkpoint: str) -> None:
    with pytest.raises(ConfigError, match="--eval-function-path sglang"):
        generate_rollout(SimpleNamespace(), 0, Source(), evaluation=True)  # type: ignore[arg-type]

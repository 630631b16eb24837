from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rollout_fakes import answer, write_jsonl

from miles.core.config import Config
from miles.core.types.rollout import GenerateFnInput
from miles.core.types.sample import Sample
from miles.rollout.data import PromptFormat, open_dataset
from miles.rollout.data_source import RolloutDataSource
from miles.rollout.generate_state import GenerateState
from miles.rollout.generators.registry import Generators
from miles.rollout.generators.single_turn import SingleTurn
from miles.rollout.multimodal import read_media, request_fields, with_placeholders
from miles.rollout.text import ChatTokenizer

KEYS = {"image": "pictures", "video": "clips"}


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def test_columns_hold_addresses_bytes_or_mappings() -> None:
    row = {
        "pictures": ["http://x/a.png", {"bytes": b"ab", "path": "b.png"}, {"bytes": None, "path": "c.png"}],
        "clips": "v.mp4",
    }
    assert read_media(row, KEYS) == {
        "images": ["http://x/a.png", data_url("image/png", b"ab"), "c.png"],
        "videos": ["v.mp4"],
    }
    assert read_media({"pictures": [], "clips": None}, KEYS) is None
    with pytest.raises(ValueError, match="'pictures' must hold addresses, paths or bytes, found int"):
        read_media({"pictures": [3]}, KEYS)


def test_placeholders_become_parts() -> None:
    messages = [{"role": "user", "content": "See <image> and <video>!"}, {"role": "assistant", "content": "Yes"}]
    written = with_placeholders(messages, {"images": ["a"], "videos": ["b"]})
    assert written[0]["content"] == [
        {"type": "text", "text": "See "},
        {"type": "image"},
        {"type": "text", "text": " and "},
        {"type": "video"},
        {"type": "text", "text": "!"},
    ]
    assert written[1] == messages[1]
    assert messages[0]["content"] == "See <image> and <video>!"


def test_there_are_as_many_placeholders_as_media() -> None:
    with pytest.raises(ValueError, match="the prompt has 1 <image>, the row has 2"):
        with_placeholders([{"role": "user", "content": "<image>"}], {"images": ["a", "b"]})


def test_files_of_this_machine_are_sent_as_data(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"jpg")
    fields = request_fields(
        {"images": [str(path), "http://x/b.png", "elsewhere.png"], "audios": ["data:audio/wav;base64,"]}
    )
    assert fields == {
        "image_data": [data_url("image/jpeg", b"jpg"), "http://x/b.png", "elsewhere.png"],
        "audio_data": ["data:audio/wav;base64,"],
    }


def test_media_travel_from_the_row_to_the_sample(tmp_path: Path) -> None:
    rows = [{"input": "What is <image>?", "pictures": ["a.png"]}, {"input": "plain"}]
    args = SimpleNamespace(
        prompt_data=str(write_jsonl(tmp_path / "data.jsonl", rows)),
        rollout_global_dataset=True, rollout_shuffle=False, rollout_max_prompt_len=None, n_samples_per_prompt=2,
        input_key="input", label_key=None, metadata_key="metadata", tool_key="tools", apply_chat_template=False,
        apply_chat_template_kwargs={}, loss_type="policy_loss", multimodal_keys=KEYS,
    )  # fmt: skip
    seeing, plain = RolloutDataSource(args).get_samples(2)
    assert [sample.multimodal_inputs for sample in seeing] == [{"images": ["a.png"]}] * 2
    assert seeing[0].prompt == [
        {
            "role": "user",
            "content": [{"type": "text", "text": "What is "}, {"type": "image"}, {"type": "text", "text": "?"}],
        }
    ]
    assert (plain[0].prompt, plain[0].multimodal_inputs) == ("plain", None)


def test_a_row_whose_media_do_not_fit_is_reported(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"input": "<image>"}, {"input": "x", "pictures": ["a"]}])
    with pytest.raises(Exception, match=r"data\.jsonl:2.*the prompt has 0 <image>, the row has 1"):
        open_dataset(str(path), PromptFormat(multimodal_keys=KEYS))


async def test_media_are_in_the_request_and_samples_go_one_by_one(tokenizer: ChatTokenizer) -> None:
    sent: list[Any] = []

    class Client:
        async def post(self, path: str, payload: Any, headers: Any = None) -> Any:
            sent.append(payload)
            return answer(payload)

    args = SimpleNamespace(rollout_max_context_len=None, eval_max_context_len=None)
    state = GenerateState(args, tokenizer, Client())  # type: ignore[arg-type]
    sample = Sample(prompt="look", multimodal_inputs={"images": ["http://x/a.png"]})
    await SingleTurn()(GenerateFnInput(state, sample, {"max_new_tokens": 4, "sampling_seed": 1}))
    assert sent[0]["image_data"] == ["http://x/a.png"]
    assert Generators(None).together([sample, sample]) is None


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--multimodal-keys", '{"picture": "a"}'], "'picture' is not a kind of media"),
        (["--multimodal-keys", '{"image": "a"}', "--device", "cpu"], "the embedded engine serves text models"),
        (["--multimodal-keys", '{"image": "a"}'], "the trainers take text only"),
    ],
)
def test_media_go_where_they_can_be_used(flags: list[str], problem: str) -> None:
    _, problems = Config.examine(["--rollout-batch-size", "8", *flags])
    assert any(problem in one for one in problems), problems

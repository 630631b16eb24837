import json

import gsm8k
import pytest
from gsm8k import EXCERPT, read_rows, solution_row, split_answer, write_data


def test_the_excerpt_and_its_licence_are_there():
    assert len(list(read_rows(EXCERPT / "train.jsonl"))) == 64
    assert len(list(read_rows(EXCERPT / "test.jsonl"))) == 32
    assert "MIT License" in (EXCERPT / "LICENSE").read_text()


def test_annotations_go_and_the_answer_is_split_off():
    working, answer = split_answer("He pays 2*$700 = $<<2*700=1400>>1,400.\n#### 1,400")
    assert working == "He pays 2*$700 = $1,400."
    assert answer == "1400"


def test_a_row_without_a_final_answer_is_refused():
    with pytest.raises(ValueError, match="no '####'"):
        split_answer("It is 5.")


def test_solutions_end_in_a_box():
    row = next(iter(read_rows(EXCERPT / "train.jsonl")))
    solution = solution_row(row)["messages"][1]["content"]
    assert solution.endswith("The answer is \\boxed{72}.")
    assert "<<" not in solution


def test_every_row_becomes_a_conversation_and_a_problem(tmp_path):
    data = write_data(tmp_path, EXCERPT, num_eval=8)
    counts = [len(path.read_text().splitlines()) for path in (data.solutions, data.train, data.evaluation)]
    assert counts == [64, 64, 8]
    for line in data.train.read_text().splitlines():
        row = json.loads(line)
        assert float(row["label"]) == int(row["label"])
        assert row["prompt"][0]["role"] == "user"


def test_what_is_ready_stays(tmp_path, monkeypatch):
    model, data = gsm8k.prepare(tmp_path, EXCERPT, 4, seed=0)
    monkeypatch.setattr(gsm8k, "write_data", pytest.fail)
    assert gsm8k.prepare(tmp_path, EXCERPT, 4, seed=0) == (model, data)
    assert (model / "model.safetensors").is_file()

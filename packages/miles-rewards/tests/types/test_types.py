"""What each reward type says, case by case."""

import importlib

import pytest

from miles.rewards.verdict import Verdict


def grade(name, response, label, **metadata):
    return importlib.import_module(f"miles.rewards.types.{name}").grade(response, label, metadata)


@pytest.mark.parametrize(
    ("response", "label", "verdict"),
    [
        (r"\boxed{42}", "42", (1.0, "correct")),
        (r"\boxed{42}", r"\boxed{42}", (1.0, "correct")),
        (r"\boxed{41}", "42", (0.0, "wrong")),
        (r"\boxed{0}", 0, (1.0, "correct")),
        (r"\boxed{2}", ["1", "2"], (1.0, "correct")),
        ("42", "42", (0.0, "no_answer")),
        (r"\boxed{42", "42", (0.0, "unparsable")),
        (r"\boxed{42}", None, (0.0, "bad_label")),
        (r"\boxed{42}", "", (0.0, "bad_label")),
        (r"\boxed{42}", [r"\boxed{}", ""], (0.0, "bad_label")),
    ],
)
def test_math(response, label, verdict):
    assert grade("math", response, label) == verdict


def test_math_with_the_mistakes_of_the_original():
    assert grade("math", r"\boxed{0}", 0, strict_upstream=True).category == "bad_label"
    assert grade("math", r"\boxed{32, 349}", "32349", strict_upstream=True).score == 1.0


@pytest.mark.parametrize("name", ["math", "deepscaler", "dapo", "f1", "gpqa"])
def test_the_quick_way_says_the_same(name):
    module = importlib.import_module(f"miles.rewards.types.{name}")
    for response in (r"<think>x</think> \boxed{42}", "Answer: 42", "</think>", "B", "###Response"):
        for label in ("42", None, "B", ["42", "7"], 1, ""):
            assert module.quick(response, label, {}) == module.grade(response, label, {})


def test_the_quick_way_leaves_long_answers_to_the_workers():
    module = importlib.import_module("miles.rewards.types.math")
    assert module.quick(r"\boxed{" + "1+" * 500 + "1}", "7", {}) is None


@pytest.mark.parametrize(
    ("response", "label", "verdict"),
    [
        (r"<think>a</think> \boxed{4}", "4", (1.0, "correct")),
        (r"<think>\boxed{4}</think> \boxed{5}", "4", (0.0, "wrong")),
        (r"a</think>b</think>\boxed{4}", 4.0, (1.0, "correct")),
        (r"\boxed{4}", "4", (0.0, "no_answer")),
        (r"<think> so \boxed{4}", "4", (0.0, "unclosed_thinking")),
        (r"###Response \boxed{4}", "4", (1.0, "correct")),
        (r"###Response a ###Response \boxed{4}", "4", (0.0, "no_answer")),
        (r"</think>\boxed{0.5}", ["one half", "1/2"], (1.0, "correct")),
        (r"</think>\boxed{4}", None, (0.0, "bad_label")),
    ],
)
def test_deepscaler(response, label, verdict):
    assert grade("deepscaler", response, label) == verdict


@pytest.mark.parametrize(
    ("response", "label", "right", "answer"),
    [
        ("Answer: 42", "42", True, "42"),
        ("answer :42", "42.0", True, "42"),
        ("Answer: $42$", 42, True, "42"),
        (r"Answer: \boxed{42}", "42", True, "42"),
        (r"Answer: \text{42}", "42", True, "42"),
        ("Answer: x = 42", "42", True, "42"),
        ("Answer: 42 km", "42", True, "42"),
        ("Answer: 1,234", "1234", True, "1234"),
        ("Answer: 41\nAnswer: 42", "42", True, "42"),
        (r"Answer: \frac12", r"\frac{1}{2}", True, r"\frac{1}{2}"),
        ("Answer: 100000000000000000001", "100000000000000000001", True, "100000000000000000001"),
        ("Answer: 42", "42.7", False, "42"),
        ("Answer: 42", "nan", False, "42"),
        ("Answer: 042", "42", False, "042"),
        ("Answer: 42.0", "42", False, "42.0"),
        ("**Answer:** 42", "42", False, "**42"),
        ("42", "42", False, "[INVALID]"),
        ("Answer: 42" + " " * 300, "42", False, "[INVALID]"),
    ],
)
def test_dapo(response, label, right, answer):
    assert grade("dapo", response, label).score == {"score": 1.0 if right else -1.0, "acc": right, "pred": answer}


def test_dapo_with_the_mistakes_of_the_original():
    assert grade("dapo", "Answer: 42", "42.7", strict_upstream=True).score["acc"]
    with pytest.raises(ValueError, match="could not convert"):
        grade("dapo", "Answer: 42", "x", strict_upstream=True)


def test_dapo_on_boxes():
    assert grade("dapo", r"so \boxed{42}", "42", strict_box_verify=True).score["acc"]
    assert not grade("dapo", r"\boxed{42}" + "x" * 100, "42", strict_box_verify=True).score["acc"]


@pytest.mark.parametrize(
    ("response", "label", "score"),
    [
        ("the cat", "cat", 1.0),
        ("a b c", "a b", 2 / 3),
        ("yes", "no", 0.0),
        ("yes it is", "yes", 0.0),
        ("The quick, brown fox!", "quick brown", 0.8),
        ("b b c", "b c c", 2 / 3),
        ("", "x", 0.0),
        ("hello world", ["goodbye", "hello world"], 1.0),
        ("<think>no</think><answer>hello world</answer>", "hello world", 1.0),
        ("3", 3, 1.0),
    ],
)
def test_f1(response, label, score):
    assert grade("f1", response, label).score == pytest.approx(score)


def test_f1_without_label():
    assert grade("f1", "x", None) == Verdict(0.0, "bad_label")


CHOICES = {"choices": ["Hydrogen", "Helium", "Lithium", "Boron"]}


@pytest.mark.parametrize(
    ("response", "label", "metadata", "verdict"),
    [
        ("Answer: C", "C", {}, (1.0, "correct")),
        ("Answer: c", "C", {}, (1.0, "correct")),
        ("The answer is (C)", "C", {}, (1.0, "correct")),
        ("<think>A</think>B is correct", "B", {}, (1.0, "correct")),
        ("I choose D.", "D", {}, (1.0, "correct")),
        ("Answer: B", 1, {}, (1.0, "correct")),
        (r"so \boxed{\text{E}}", "E", {}, (1.0, "correct")),
        ("**Answer: C**", "C", {}, (1.0, "correct")),
        ("So the answer is c... Answer: A", "A", {}, (1.0, "correct")),
        ("The answer is a polygon, so D", "D", {}, (1.0, "correct")),
        ("D. it cannot be A", "D", {}, (1.0, "correct")),
        ("helium", "Helium", CHOICES, (1.0, "correct")),
        ("it is helium", "B", CHOICES, (1.0, "correct")),
        ("helium or boron", "B", CHOICES, (0.0, "ambiguous")),
        ("Answer: A or B", "A", {}, (0.0, "ambiguous")),
        ("Answer: A", "B", {}, (0.0, "wrong")),
        ("no idea, sorry", "A", {}, (0.0, "no_answer")),
        ("<think>hmm</think> banana bread", "A", {}, (0.0, "no_answer")),
        ("Answer: Z", "A", {}, (0.0, "no_answer")),
        ("Answer: A", None, {}, (0.0, "bad_label")),
        ("Answer: X", "X", {"valid_letters": ["X", "Y"]}, (1.0, "correct")),
        ("Answer: B", "", {"choices": {"A": "Paris", "B": "London"}, "correct_letter": "B"}, (1.0, "correct")),
    ],
)
def test_gpqa(response, label, metadata, verdict):
    assert grade("gpqa", response, label, **metadata) == verdict


def test_gpqa_with_the_mistakes_of_the_original():
    assert grade("gpqa", "no idea, sorry", "D", strict_upstream=True).score == 1.0
    assert grade("gpqa", "So the answer is c... Answer: A", "C", strict_upstream=True).score == 1.0


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("<think>because</think> 4", 1.0),
        ("because</think> 4", 1.0),
        ("4", 0.0),
        ("<think></think> 4", 0.0),
        ("<think>because</think>", 0.0),
        ("<think>a</think><think>b</think> 4", 0.0),
        ("<think>because 4", 0.0),
    ],
)
def test_format(response, score):
    assert grade("format", response, None).score == score


@pytest.mark.parametrize(
    ("response", "score", "category"),
    [
        ("<think>2+2</think> 4", 1.0, "correct"),
        ("4", 1.0, "correct"),
        ("5", 0.0, "wrong"),
        ("<think>2+2</think>", 0.0, "no_answer"),
    ],
)
def test_reasoning_gym(response, score, category):
    pytest.importorskip("reasoning_gym")
    entry = {"question": "2 + 2 =", "answer": "4", "metadata": {"source_dataset": "chain_sum"}}
    for metadata in (entry["metadata"], {"entry": entry}, {"dataset": "chain_sum"}):
        verdict = grade("reasoning_gym", response, "4", **metadata)
        assert verdict.category == category
        assert verdict.score == pytest.approx(score, abs=0.1)


def test_reasoning_gym_needs_the_name_of_the_task():
    assert grade("reasoning_gym", "4", "4").category == "bad_label"


def test_overlong_falls_linearly_over_its_buffer():
    from miles.rewards.types.overlong import overlong_penalty

    assert [overlong_penalty(length, 100, 20) for length in (0, 80, 90, 100, 120)] == [0.0, 0.0, -0.5, -1.0, -1.0]

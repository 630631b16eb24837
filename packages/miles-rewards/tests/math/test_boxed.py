import pytest

from miles.rewards.math.boxed import has_box, last_boxed


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{}", ""),
        (r"\boxed{3", None),
        (r"\boxed 3", None),
        (r"\fbox{3}", None),
        ("42", None),
        ("", None),
    ],
)
def test_the_last_box_counts(text, content):
    assert last_boxed(text) == content


def test_a_long_response_costs_nothing():
    assert last_boxed("x" * 5_000_000 + r"\boxed{7}") == "7"


def test_a_broken_box_is_a_box():
    assert has_box(r"\boxed{3")
    assert not has_box("3")

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.rewards.math.expression import NotAnExpression, parse, same


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1/2+1/3", "5/6"),
        ("2x", "x+x"),
        ("1/2x", "x/2"),
        ("2(x+1)", "2x+2"),
        ("xy", "y*x"),
        ("-x^2", "-(x^2)"),
        ("x^-1", "1/x"),
        ("2^3^2", "2^9"),
        ("4!", "24"),
        ("sqrt(2)sqrt(3)", "sqrt(6)"),
        ("1/(sqrt(3)-sqrt(2))", "sqrt(3)+sqrt(2)"),
        ("0.1+0.2", "0.3"),
        ("--1", "1"),
        ("(x^9-1)/(x-1)", "x^8+x^7+x^6+x^5+x^4+x^3+x^2+x+1"),
    ],
)
def test_equal_expressions(first, second):
    assert same(parse(first), parse(second))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1/2+1/3", "2/3"),
        ("x", "y"),
        ("sqrt(x^2)", "x"),
        ("sqrt(x)sqrt(y)", "sqrt(xy)"),
        ("pi", "355/113"),
        ("1/0", "1/0"),
        ("1.0000000000000000000001", "1.0"),
        ("sqrt(2)", "1.41421356237309504880168872420969807"),
    ],
)
def test_different_expressions(first, second):
    assert not same(parse(first), parse(second))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1+",
        "(1",
        "1)",
        "x'",
        "a.b",
        "1,2",
        "f=x",
        "1000!",
        "x!",
        "2^1000",
        "[x]",
        "(" * 60 + "1" + ")" * 60,
        "1+" * 300 + "1",
    ],
)
def test_what_is_outside_the_grammar_is_refused(text):
    with pytest.raises(NotAnExpression):
        parse(text)


@pytest.mark.parametrize(
    "text", ["(((9^9)^9)^9)^9", "9^9*9^9*9^9", "(x+y)^99-(x-y)^99", "1/(x-x)", "sqrt(sqrt(sqrt(0-x)))^99"]
)
def test_hard_expressions_cost_milliseconds(text):
    started = time.process_time()
    same(parse(text), parse("x+7/3"))
    assert time.process_time() - started < 0.5


trees = st.recursive(
    st.sampled_from(["x", "y", "2", "3.5", "7"]),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda parts: f"({''.join(parts)})"),
    max_leaves=6,
)


@given(trees, trees)
def test_sums_commute(first, second):
    assert same(parse(f"{first}+{second}"), parse(f"{second}+{first}"))


@given(trees)
def test_one_more_is_not_the_same(tree):
    assert not same(parse(tree), parse(f"{tree}+1"))

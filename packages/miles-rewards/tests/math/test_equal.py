import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from miles.rewards.math import equal, plain
from miles.rewards.math.mathd import normalize

SAME = [
    ("42.0", "42"),
    ("1,000", "1000"),
    (r"1{,}000", "1000"),
    (r"11,\! 111,\! 100", "11111100"),
    (r"\frac{1}{2}", "0.5"),
    ("1/2", r"\frac12"),
    (r"\dfrac{1}{2}", r"\frac 1 2"),
    ("x+1", "1+x"),
    (r"\left(x-2\right)\left(x+2\right)", "(x-2)(x+2)"),
    ("(x-2)(x+2)", "x^2-4"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\sqrt3", r"\sqrt{3}"),
    ("x^{10}", "x^{10}"),
    (r"50\%", "50"),
    (r"\$10", "10"),
    ("10 cm", "10"),
    (r"10\text{ cm}^{2}", "10"),
    ("a", "A"),
    (r"7 3/4", "31/4"),
    (r"1\frac{1}{2}", "1.5"),
    (r"-1\frac{1}{2}", "-1.5"),
    (r"90^\circ", "90"),
    ("x=5", "5"),
    (r"-\frac{1}{3}", "-1/3"),
    ("1e3", "1000"),
    (".5", "0.5"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"\frac{x+1}{2}", "(x+1)/2"),
    (r"2\pi", r"\pi \cdot 2"),
    ("(1, 4.5)", r"(1,\frac{9}{2})"),
    (r"[-1, \tfrac12)", "[-1,1/2)"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\begin{pmatrix}0 & 1\\2 & 3\end{pmatrix}", r"\begin{bmatrix} 0&1\\ 2&3 \end{bmatrix}"),
    ("9" * 5000, "9" * 5000 + ".0"),
    ("42", "４２"),
]
DIFFERENT = [
    ("2/4", "1/2"),  # fractions must be reduced alike
    ("[1,2)", "(1,2)"),
    ("5", "5.5"),
    ("2 million", "2000000"),
    ("a+b+c", "c+b+a"),  # more than two letters
    ("32, 349", "32349"),
    ("10, 4, -2", "4, 10, -2"),
    ("(1,2,3)", "(1,2)"),
    ("sqrt(4)", "2"),  # an integer equals only integers
    (r"\sqrt{x^2}", "x"),
    ("0.333", "1/3"),
    (r"3.14159265358979", r"\pi"),
    ("x^2", "2^x"),
    ("", "42"),
    ("x", ""),
    ("1e99999999", "7/3"),
    ("9**9**9**9", "7/3"),
    ("99999999!", "7/3"),
    ("__import__('os').getpid()", "7/3"),
    ("((((((9^9)^9)^9)^9)^9)^9)", "7/3"),
]


@pytest.mark.parametrize(("answer", "label"), SAME)
def test_equal_answers(answer, label):
    assert equal(answer, label)


@pytest.mark.parametrize(("answer", "label"), DIFFERENT)
def test_different_answers(answer, label):
    assert not equal(answer, label)


def test_loose_thousands_are_an_option():
    assert equal("32, 349", "32349", loose_thousands=True)


@given(st.text(max_size=60))
@example("=")
def test_any_text_equals_itself_unless_nothing_is_left_of_it(text):
    assert equal(text, text) == (bool(normalize(text)) or plainly_something(text))


def plainly_something(text):
    """Whether the second normalization leaves something of a text that it can read."""
    try:
        return bool(plain.normalize(text, loose_thousands=False))
    except ValueError:
        return False


@given(
    st.text(alphabet="0123456789.+-*/^()!{}\\[], \nxyπsqrtfacepi_&$%", max_size=80),
    st.sampled_from(["7/3", "x+1", "5"]),
)
def test_no_answer_raises(text, label):
    equal(text, label)


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_integers_are_equal_when_they_are(first, second):
    assert equal(str(first), f"{second:,}") == (first == second)


@given(st.integers(-500, 500), st.integers(1, 500), st.integers(-500, 500), st.integers(1, 500))
def test_sums_of_fractions_have_their_value(a, b, c, d):
    assert equal(f"{a}/{b}+({c})/{d}", f"({a * d + c * b})/({b * d})*1")
    assert not equal(f"{a}/{b}+({c})/{d}", f"({a * d + c * b + 1})/({b * d})*1")

"""Second comparison, second half: are two plain expressions the same number or function?

Expressions are parsed by a small grammar of our own (never by ``eval``) and compared by value: exactly when both are
rational numbers, else by identity testing: both are evaluated with 60 digits at points where two different expressions
built from the arithmetic operations and roots cannot agree by accident.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import factorial
from typing import Any

import mpmath  # type: ignore[import-untyped]

_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d*)?|\.\d+)|(sqrt|pi)|([^\W\d_])|(\*\*|[-+*/^()!]))")
_MAX_CHARS = 400
_MAX_TOKENS = 200
_MAX_DEPTH = 40
_MAX_FACTORIAL = 999
_MAX_EXPONENT = 99
_MAX_BITS = 20_000
_LONG_DIGITS = mpmath.mp.clone()
_LONG_DIGITS.dps = 60
_TOLERANCE = Fraction(1, 10**40)


class NotAnExpression(ValueError):
    """The text is outside the grammar, or too large to be an answer."""


@dataclass(frozen=True, slots=True)
class Node:
    """``kind``: number (``value``), symbol (``name``), or an operation on ``args``."""

    kind: str
    args: tuple[Node, ...] = ()
    value: Fraction = Fraction(0)
    name: str = ""


@lru_cache(maxsize=2048)
def parse(text: str) -> Node:
    """The expression in ``text``.  Raises NotAnExpression."""
    if len(text) > _MAX_CHARS:
        raise NotAnExpression(f"{len(text)} characters")
    return _Parser(_tokens(text)).parse()


def same(first: Node, second: Node) -> bool:
    """Whether two expressions are equal as numbers, or as functions of their symbols.

    Roots are principal and symbols complex, so ``sqrt(x^2)`` is not ``x``.
    """
    try:
        exact = _exact(first), _exact(second)
    except ArithmeticError:
        return False
    if None not in exact:
        return exact[0] == exact[1]
    return _agree_at_points(first, second)


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise NotAnExpression(f"{text[position : position + 10]!r} is not arithmetic")
        number, name, letter, operator = match.groups()
        kind = "number" if number else "name" if name else "symbol" if letter else "operator"
        tokens.append((kind, "^" if operator == "**" else match.group(match.lastindex or 0)))
        position = match.end()
    if len(tokens) > _MAX_TOKENS:
        raise NotAnExpression(f"{len(tokens)} tokens")
    return tokens


class _Parser:
    """Recursive descent.  Multiplication may be left out and then binds as tightly as a written one."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = tokens
        self._next = 0
        self._depth = 0

    def parse(self) -> Node:
        node = self._sum()
        if self._next < len(self._tokens):
            raise NotAnExpression(f"{self._tokens[self._next][1]!r} is left over")
        return node

    def _peek(self) -> str:
        return self._tokens[self._next][1] if self._next < len(self._tokens) else ""

    def _take(self) -> tuple[str, str]:
        if self._next >= len(self._tokens):
            raise NotAnExpression("it ends too early")
        self._next += 1
        return self._tokens[self._next - 1]

    def _sum(self) -> Node:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise NotAnExpression("it is nested too deeply")
        node = self._product()
        while self._peek() in ("+", "-"):
            _, operator = self._take()
            node = Node(operator, (node, self._product()))
        self._depth -= 1
        return node

    def _product(self) -> Node:
        node = self._signed()
        while (peek := self._peek()) and peek not in ("+", "-", ")", "^", "!"):
            operator = self._take()[1] if peek in ("*", "/") else "*"
            node = Node(operator, (node, self._signed()))
        return node

    def _signed(self) -> Node:
        negative = False
        while self._peek() in ("+", "-"):
            negative ^= self._take()[1] == "-"
        node = self._power()
        return Node("neg", (node,)) if negative else node

    def _power(self) -> Node:
        base = self._factorial()
        if self._peek() != "^":
            return base
        self._take()
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise NotAnExpression("its powers are nested too deeply")
        exponent = self._signed()
        self._depth -= 1
        if _too_large(exponent):
            raise NotAnExpression("an exponent is too large")
        return Node("^", (base, exponent))

    def _factorial(self) -> Node:
        node = self._atom()
        while self._peek() == "!":
            self._take()
            if node.kind != "number" or node.value.denominator != 1 or node.value > _MAX_FACTORIAL:
                raise NotAnExpression("a factorial is too large")
            node = Node("number", value=Fraction(factorial(int(node.value))))
        return node

    def _atom(self) -> Node:
        kind, text = self._take()
        if kind == "number":
            return Node("number", value=Fraction(text))
        if kind == "symbol":
            return Node("symbol", name=text)
        if text == "pi":
            return Node("pi")
        if text == "sqrt":
            return Node("sqrt", (self._factorial(),))
        if text == "(":
            node = self._sum()
            if self._take()[1] != ")":
                raise NotAnExpression("a parenthesis is not closed")
            return node
        raise NotAnExpression(f"{text!r} stands in a wrong place")


def _too_large(exponent: Node) -> bool:
    value = _exact(exponent) if exponent.kind in ("number", "neg") else None
    return value is not None and abs(value) > _MAX_EXPONENT


def _exact(node: Node) -> Fraction | None:
    """The value of a rational number; None for anything that is not one at sight.  Raises ArithmeticError."""
    if node.kind == "number":
        return node.value
    if node.kind in ("symbol", "pi", "sqrt"):
        return None
    values = [_exact(arg) for arg in node.args]
    if any(value is None or _bits(value) > _MAX_BITS for value in values):
        return None
    return _EXACT[node.kind](*values)


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1 or abs(exponent) * _bits(base) > _MAX_BITS:
        return None
    return base ** int(exponent)


_EXACT: dict[str, Callable[..., Fraction | None]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "neg": lambda a: -a,
    "^": _exact_power,
}

# Symbols are set to values without a simple relation to each other or to integers: some in the right, some in the left
# half plane, so that identities of positive numbers only do not pass for general ones.
_POINTS = (
    (0.7390851332151607, 0.5671432904097838),
    (-1.3247179572447460, 0.4142135623730951),
    (-0.6180339887498949, -1.2020569031595942),
)


def _agree_at_points(first: Node, second: Node) -> bool:
    """Cheap machine arithmetic tells different expressions apart; equality needs the long digits."""
    symbols = sorted(_symbols(first) | _symbols(second))
    points = [
        {name: complex(real * (i + 1), imaginary + 0.3 * i) for i, name in enumerate(symbols)}
        for real, imaginary in (_POINTS if symbols else _POINTS[:1])
    ]
    return all(_maybe_equal(first, second, point) for point in points[:1]) and all(
        _equal_in_long_digits(first, second, point) for point in points
    )


def _symbols(node: Node) -> set[str]:
    return {node.name} if node.kind == "symbol" else {name for arg in node.args for name in _symbols(arg)}


def _maybe_equal(first: Node, second: Node, point: dict[str, complex]) -> bool:
    try:
        a, b = (_machine(node, point) for node in (first, second))
        return abs(a - b) <= 1e-6 * max(abs(a), abs(b), 1e-3)
    except ArithmeticError:
        return True  # machine numbers cannot tell


def _machine(node: Node, point: dict[str, complex]) -> complex:
    if node.kind == "number":
        return complex(node.value)
    if node.kind == "symbol":
        return point[node.name]
    if node.kind == "pi":
        return 3.141592653589793 + 0j
    return _MACHINE[node.kind](*(_machine(arg, point) for arg in node.args))


_MACHINE: dict[str, Callable[..., complex]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "neg": lambda a: -a,
    "^": lambda a, b: a**b,
    "sqrt": lambda a: a**0.5,
}


def _equal_in_long_digits(first: Node, second: Node, point: dict[str, complex]) -> bool:
    context = _LONG_DIGITS
    try:
        a, b = (_long(node, point, context) for node in (first, second))
        scale = max(abs(a), abs(b), context.mpf(10) ** -20)
        return bool(abs(a - b) <= scale * _TOLERANCE.numerator / _TOLERANCE.denominator)
    except (ArithmeticError, ValueError):
        return False


def _long(node: Node, point: dict[str, complex], context: Any) -> Any:
    if node.kind == "number":
        return context.mpf(node.value.numerator) / node.value.denominator
    if node.kind == "symbol":
        return context.mpc(point[node.name])
    if node.kind == "pi":
        return +context.pi
    args = [_long(arg, point, context) for arg in node.args]
    return context.sqrt(*args) if node.kind == "sqrt" else _MACHINE[node.kind](*args)

"""LaTeX mathematics -> plain text: ``\\frac{x+1}{2}`` -> ``(x+1)/2``.

Only what stands in answers.  An unknown command keeps its name, so that two different answers stay different.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_TOKEN = re.compile(r"\\[a-zA-Z]+\*?|\\.|[{}^_&\[\]]|[^\\{}^_&\[\]]+", re.DOTALL)
_ATOM_ABOVE = re.compile(r"-?(?:[\w.]+|[\w.]*sqrt\([^()]*\))")
_ATOM_BELOW = re.compile(r"[\d.]+|[^\W\d]|pi|sqrt\([^()]*\)")
_POWER_ATOM = re.compile(r"\d+|[^\W\d]")
_MAX_DEPTH = 64

_GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "varepsilon": "ε", "zeta": "ζ", "eta": "η",
    "theta": "θ", "vartheta": "θ", "iota": "ι", "kappa": "κ", "lambda": "λ", "mu": "μ", "nu": "ν", "xi": "ξ",
    "rho": "ρ",
    "sigma": "σ", "tau": "τ", "upsilon": "υ", "phi": "φ", "varphi": "φ", "chi": "χ", "psi": "ψ", "omega": "ω",
    "Gamma": "Γ", "Delta": "Δ", "Theta": "Θ", "Lambda": "Λ", "Xi": "Ξ", "Sigma": "Σ", "Phi": "Φ", "Psi": "Ψ",
    "Omega": "Ω",
}  # fmt: skip
_SYMBOLS = {
    "pi": "pi", "infty": "inf", "cup": "u", "cap": "∩", "cdot": "*", "times": "*", "ast": "*", "div": "/", "pm": "±",
    "mp": "∓", "le": "≤", "leq": "≤", "leqslant": "≤", "ge": "≥", "geq": "≥", "geqslant": "≥", "ne": "≠", "neq": "≠",
    "lt": "<", "gt": ">", "in": "∈", "emptyset": "∅", "varnothing": "∅", "approx": "≈", "to": "→", "rightarrow": "→",
    "ldots": "...", "dots": "...", "cdots": "...", "lbrace": "", "rbrace": "", "langle": "<", "rangle": ">",
}  # fmt: skip
_SILENT = frozenset(
    ("left", "right", "big", "Big", "bigl", "bigr", "Bigl", "Bigr", "bigg", "Bigg", "displaystyle", "textstyle",
     "limits",
     "quad", "qquad")
)  # fmt: skip
_WRAPPERS = frozenset(
    ("text", "mathrm", "mathbf", "mathit", "mathsf", "mathcal", "textbf", "textit", "textrm", "mbox", "operatorname",
     "boldsymbol")
)  # fmt: skip
_FRACTIONS = frozenset(["frac", "tfrac", "dfrac", "cfrac"])


def to_plain(text: str) -> str:
    """``text`` without LaTeX.  Raises ValueError when it is nested deeper than any answer."""
    return _Converter(_TOKEN.findall(text)).convert()


class _Converter:
    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._next = 0
        self._depth = 0
        self._commands: dict[str, Callable[[], str]] = {
            **dict.fromkeys(_FRACTIONS, self._fraction),
            **dict.fromkeys(_WRAPPERS, self._argument),
            "sqrt": self._root,
            "begin": self._begin,
            "end": self._end,
        }

    def convert(self) -> str:
        parts = []
        while self._next < len(self._tokens):
            parts.append(self._element(self._take()))
        return "".join(parts).strip()

    def _take(self) -> str:
        token = self._tokens[self._next]
        self._next += 1
        return token

    def _element(self, token: str) -> str:
        if token == "{":
            return self._group()
        if token == "}":
            return ""
        if token == "^":
            return "^" + self._script()
        if token == "_":
            return "_" + self._argument()
        if token == "&":
            return ","
        return self._command(token[1:].rstrip("*")) if token.startswith("\\") else token

    def _command(self, name: str) -> str:
        if command := self._commands.get(name):
            return command()
        if name in _SILENT:
            return ""
        if not name.isalpha():
            return {"\\": ";"}.get(name, name if name in "%$#&_" else " ")
        return _SYMBOLS.get(name) if name in _SYMBOLS else _GREEK.get(name, f" {name} ")  # type: ignore[return-value]

    def _group(self) -> str:
        """What stands up to the closing brace; the opening one is taken."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ValueError(f"braces are nested deeper than {_MAX_DEPTH}")
        parts = []
        while self._next < len(self._tokens):
            token = self._take()
            if token == "}":
                break
            parts.append(self._element(token))
        self._depth -= 1
        return "".join(parts).strip()

    def _argument(self) -> str:
        """A group, a command with its arguments, or a single character."""
        if self._next >= len(self._tokens):
            return ""
        token = self._take()
        if token in "{}^_&" or token.startswith("\\"):
            self._depth += 1
            if self._depth > _MAX_DEPTH:
                raise ValueError(f"commands are nested deeper than {_MAX_DEPTH}")
            plain = self._element(token)
            self._depth -= 1
            return plain
        token = token.lstrip()
        if len(token) > 1:
            self._next -= 1
            self._tokens[self._next] = token[1:]
        return token[:1]

    def _fraction(self) -> str:
        above, below = self._argument(), self._argument()
        above = above if _ATOM_ABOVE.fullmatch(above) else f"({above})"
        below = below if _ATOM_BELOW.fullmatch(below) else f"({below})"
        return f" {above}/{below}"

    def _root(self) -> str:
        degree = ""
        if self._next < len(self._tokens) and self._tokens[self._next] == "[":
            self._take()
            while self._next < len(self._tokens) and (token := self._take()) != "]":
                degree += token
        radicand = self._argument()
        return f"({radicand})^(1/({degree}))" if degree.strip() not in ("", "2") else f"sqrt({radicand})"

    def _script(self) -> str:
        exponent = self._argument()
        return exponent if _POWER_ATOM.fullmatch(exponent) else f"({exponent})"

    def _begin(self) -> str:
        environment = self._argument()
        if environment == "array":
            self._argument()
        return "["

    def _end(self) -> str:
        self._argument()
        return "]"

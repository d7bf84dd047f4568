"""Equations of cards, as LaTeX.

The notation of a card, one statement to a line:

- a letter is a variable, Latin or Greek, with marks (`x̂`, `k̃`), primes, indices (`q_i`, `W_out`, `x_{i, j+1}`, `a₁`)
  and powers (`kᵀ`, `D⁻¹`, `2^(−h)`); what stands side by side is multiplied;
- two letters or more are the name of a function where a bracket or an index follows, or where it is one that everybody
  knows (`softmax`, `relu`, `max`); other words are words: `within windows`;
- `a b / c` is a fraction: above are all factors since the last sum, below is what stands together without a space;
- `Σ_j`, `Π_i`, `√d`, `∂x_i`, `|i − j|`, `‖x‖`, `⌊d / 2⌋`, `[a; b]`, `{1, …, k}`, `∈ ≤ ← ∝ ⊙ · ⋆ ∪`.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import NoReturn

from attnzoo.errors import Place, ZooError

_GREEK = {
    unicodedata.lookup(
        f"GREEK {case} LETTER {name}"
    ): rf"\{name.lower() if case == 'SMALL' else name.title()}"
    for case, names in (
        (
            "SMALL",
            "ALPHA BETA GAMMA DELTA EPSILON ZETA ETA THETA KAPPA MU NU XI PI RHO SIGMA TAU PHI CHI PSI OMEGA",
        ),
        ("CAPITAL", "GAMMA DELTA THETA XI PHI PSI OMEGA"),
    )
    for name in names.split()
} | {"λ": r"\lambda", "Λ": r"\Lambda", "ε": r"\varepsilon", "φ": r"\varphi"}
_LETTERS = {letter: letter for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"} | _GREEK
_MARKS = {"\u0302": r"\hat", "\u0303": r"\tilde", "\u0304": r"\bar", "\u0307": r"\dot"}
_SYMBOLS = {
    "…": r"\dots",
    "⋯": r"\cdots",
    "∞": r"\infty",
    "∅": r"\emptyset",
    "¼": r"\tfrac{1}{4}",
    "½": r"\tfrac{1}{2}",
}
_ABOVE = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁱⁿ", "0123456789+-in", strict=True)) | {"ᵀ": r"\top "}
_BELOW = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ᵢⱼₖₙₘₜₕ", "0123456789+-ijknmth", strict=True))
_SUMS = {"Σ": r"\sum", "∑": r"\sum", "Π": r"\prod", "∏": r"\prod"}
_SIGNS = {"+": "+", "−": "-", "-": "-", "±": r"\pm"}
_TIMES = {"·": r"\cdot", "⊙": r"\odot", "×": r"\times", "⋆": r"\star", "∘": r"\circ", "⊗": r"\otimes"}
_RELATIONS = {
    "=": "=", "≠": r"\neq", "<": "<", ">": ">", "≤": r"\leq", "≥": r"\geq", "≈": r"\approx", "∝": r"\propto",
    "∈": r"\in", "∉": r"\notin", "←": r"\leftarrow", "→": r"\rightarrow", "∼": r"\sim", "∪": r"\cup",
    "∩": r"\cap", "∖": r"\setminus",
}  # fmt: skip
_STOPS = {",": ",", ";": ";", ":": ":"}
_BRACKETS = {
    "(": (")", "(", ")"), "[": ("]", "[", "]"), "{": ("}", r"\{", r"\}"), "⌊": ("⌋", r"\lfloor", r"\rfloor"),
    "⌈": ("⌉", r"\lceil", r"\rceil"), "|": ("|", r"\lvert", r"\rvert"), "‖": ("‖", r"\lVert", r"\rVert"),
}  # fmt: skip
_CLOSING = {closing for closing, *_ in _BRACKETS.values()}
_DEEPEST = 40
"""Brackets within brackets."""
_MACROS = {"max", "min", "exp", "ln", "log", "cos", "sin", "tanh"}
"""Functions that LaTeX has a command for."""
_FUNCTIONS = _MACROS | {
    "softmax",
    "relu",
    "gelu",
    "silu",
    "elu",
    "sigmoid",
    "softplus",
    "mean",
    "argmax",
    "diag",
}
"""Functions that everybody knows, with a bracket or without."""


def latex(equation: str) -> str:
    r"""LaTeX of an equation of a card, without the dollars: `\operatorname{softmax}\left(...\right) v`.

    Args:
        equation: As a card has it; several lines become a `split` environment, aligned at the first relation of each:
            alone among those that MathJax, KaTeX and LaTeX's displays have, it is known to latex2mathml too.

    Raises:
        ZooError: AZ977, for what is not in the notation above: the character, and where it stands.
    """
    lines = [_Line(text, number) for number, text in enumerate(equation.split("\n"), start=1)]
    if len(lines) == 1:
        return lines[0].latex(align=False)
    rows = r" \\ ".join(line.latex(align=True) for line in lines)
    return rf"\begin{{split}} {rows} \end{{split}}"


@dataclass(frozen=True)
class _Token:
    """A piece of a line.

    Args:
        kind: `letter`, `word`, `number`, `above`, `below`, or the character itself.
        text: It, without marks, as LaTeX where that is known.
        column: Where it begins, from 1.
        width: How many characters it takes.
        gap: How many spaces stand before it.
    """

    kind: str
    text: str
    column: int
    width: int
    gap: int


@dataclass(frozen=True)
class _Factor:
    """LaTeX of one factor, and what is in its round brackets if it is nothing else than these."""

    text: str
    inside: str | None = None


class _Line:
    """One line, read from left to right.

    Args:
        text: Of the equation.
        number: Its number, from 1.
    """

    def __init__(self, text: str, number: int):
        self.text, self.number = text, number
        self.tokens = self._tokens()
        self.at = 0
        self.scripts = 0
        """How deep in indices and powers, where fractions are flat."""
        self.open: list[str] = []
        """Brackets, roots and the like that are open; only the last one's other half closes a `|` or `‖`."""

    def latex(self, align: bool) -> str:
        """The whole line.

        Args:
            align: Whether `&` stands before the first relation, or before the line if it has none.
        """
        if not self.tokens:
            self._refuse("an equation has an empty line", 1)
        text = self._statement(align)
        if self._next() is not None:
            self._refuse(f"`{self._shown()}` closes nothing")
        return text if "&" in text or not align else f"& {text}"

    # pieces

    def _tokens(self) -> list[_Token]:
        found, at, gap = [], 0, 0
        while at < len(self.text):
            char = self.text[at]
            if char == " ":
                at, gap = at + 1, gap + 1
                continue
            kind, text, width = self._token(at)
            found.append(_Token(kind, text, at + 1, width, gap))
            at, gap = at + width, 0
        return found

    def _token(self, at: int) -> tuple[str, str, int]:
        """Kind, text and width of the token that begins here."""
        rest = self.text[at:]
        char = rest[0]
        letter, *marks = list(unicodedata.normalize("NFD", char))
        word = re.match(r"[A-Za-z]{2,}", rest)
        if word:
            return "word", word[0], word.end()
        if letter in _LETTERS and letter not in _SUMS:
            width = 1
            while rest[width : width + 1] and unicodedata.combining(rest[width]):
                marks.append(rest[width])
                width += 1
            text = _LETTERS[letter]
            for mark in marks:
                if mark not in _MARKS:
                    self._refuse(f"the mark on `{rest[:width]}` is none that is known", at + 1)
                text = rf"{_MARKS[mark]}{{{text}}}"
            return "letter", text, width
        number = re.match(r"\d+(\.\d+)?", rest)
        if number and number[0].isascii():
            return "number", number[0], number.end()
        for kind, known in (("above", _ABOVE), ("below", _BELOW)):
            if char in known:
                run = re.match(f"[{''.join(known)}]+", rest)
                assert run is not None
                return kind, "".join(known[one] for one in run[0]), run.end()
        if char in "'′":
            return "above", r"\prime ", 1
        if char in _SYMBOLS:
            return "symbol", _SYMBOLS[char], 1
        if char not in {*_SUMS, *_SIGNS, *_TIMES, *_RELATIONS, *_STOPS, *_BRACKETS, *_CLOSING, *"/_^√∂∇"}:
            name = unicodedata.name(char, "a character without a name").lower()
            self._refuse(f"`{char}` ({name}) is not in the notation of equations", at + 1)
        return char, char, 1

    def _next(self, ahead: int = 0) -> _Token | None:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else None

    def _kind(self, ahead: int = 0) -> str:
        token = self._next(ahead)
        return "" if token is None else token.kind

    def _take(self) -> _Token:
        self.at += 1
        return self.tokens[self.at - 1]

    def _shown(self) -> str:
        token = self._next()
        return "" if token is None else self.text[token.column - 1 : token.column - 1 + token.width]

    def _refuse(self, message: str, column: int | None = None) -> NoReturn:
        token = self._next() if column is None else None
        place = Place(
            "equation", self.number, column or (token.column if token else len(self.text) + 1), 1, self.text
        )
        raise ZooError(
            "AZ977",
            message,
            place=place,
            help="the notation of equations is in docs/writing-a-plugin.md: `softmax(q kᵀ / √d) v`",
        )

    # statements: products with signs, relations and stops between them

    def _statement(self, align: bool = False) -> str:
        parts: list[str] = []
        operand = False  # whether one stands to the left
        while (kind := self._kind()) and not self._closes(kind, operand):
            if kind in _SIGNS:
                parts.append(_SIGNS[self._take().kind])
                operand = False
            elif kind in _RELATIONS or kind in _STOPS:
                if not operand:
                    self._refuse(f"`{self._shown()}` has nothing to its left")
                token = self._take()
                if kind in _RELATIONS:
                    sign = _RELATIONS[kind]
                    first = align and kind in "=←∝" and not any(part.startswith("&") for part in parts)
                    parts.append(f"&{sign}" if first else sign)
                else:
                    following = self._next()
                    wide = kind in ",;" and following is not None and following.gap > 1
                    parts.append(rf"{_STOPS[token.kind]}\quad" if wide else _STOPS[token.kind])
                operand = False
            else:
                parts.append(self._product())
                operand = True
        if not operand:
            self._refuse("something is missing here" if self._next() else "something is missing at the end")
        return " ".join(parts)

    def _closes(self, kind: str, operand: bool = True) -> bool:
        """Whether a token ends what is open; a bar does after an operand, where it was the last to open."""
        if kind in ("|", "‖"):
            return operand and bool(self.open) and self.open[-1] == kind
        return kind in _CLOSING

    def _starts(self, operand: bool = False) -> bool:
        """Whether the next token begins a factor; after an operand a bar may close instead."""
        kind = self._kind()
        plain = ("letter", "word", "number", "symbol", "√", "∂", "∇")
        return kind in plain or (kind in _BRACKETS and not self._closes(kind, operand))

    def _product(self) -> str:
        done: list[str] = []  # sums, and what cannot be above a fraction any more
        factors: list[_Factor] = []
        while kind := self._kind():
            if kind in _SUMS:
                done += [factor.text for factor in factors]
                factors = []
                self._take()
                done.append(self._with_scripts(_SUMS[kind]))
                if not self._starts() and self._kind() not in _SUMS:
                    self._refuse("a sum or product is of nothing")
            elif self._starts(operand=bool(done or factors)):
                factors.append(self._factor())
            elif kind in _TIMES:
                if not factors:
                    self._refuse(f"`{self._shown()}` has nothing to its left")
                factors.append(_Factor(_TIMES[self._take().kind]))
                if not self._starts() and self._kind() not in _SUMS:
                    self._refuse("something is missing here")
            elif kind == "/":
                if not factors:
                    self._refuse("`/` has nothing above it")
                factors = [self._fraction(factors)]
            elif kind in ("_", "^", "above", "below"):
                self._refuse(f"`{self._shown()}` belongs to nothing")
            else:
                break
        return " ".join([*done, *(factor.text for factor in factors)])

    def _fraction(self, above: list[_Factor]) -> _Factor:
        self._take()
        if not self._starts():
            self._refuse("`/` has nothing below it")
        below = [self._factor()]
        while (token := self._next()) is not None and token.gap == 0 and self._starts(operand=True):
            below.append(self._factor())
        if self.scripts:
            return _Factor("/".join(" ".join(factor.text for factor in part) for part in (above, below)))
        top, bottom = (
            part[0].inside
            if len(part) == 1 and part[0].inside is not None
            else " ".join(f.text for f in part)
            for part in (above, below)
        )
        return _Factor(rf"\frac{{{top}}}{{{bottom}}}")

    # factors: what a power may belong to

    def _factor(self) -> _Factor:
        if len(self.open) > _DEEPEST:
            self._refuse("brackets and roots are nested too deeply")
        token = self._take()
        if token.kind == "word":
            return self._word(token)
        if token.kind == "√":
            if not self._starts():
                self._refuse("`√` is of nothing")
            self.open.append(token.kind)
            of = self._factor()
            self.open.pop()
            return _Factor(rf"\sqrt{{{of.text if of.inside is None else of.inside}}}")
        if token.kind in ("∂", "∇"):
            sign = r"\partial" if token.kind == "∂" else r"\nabla"
            if not self._starts():
                self._refuse(f"`{token.kind}` is of nothing")
            self.open.append(token.kind)
            of = self._factor()
            self.open.pop()
            return _Factor(f"{sign} {of.text}")
        if token.kind in _BRACKETS:
            inside, text = self._bracket(token)
            whole = self._with_scripts(text)
            return _Factor(whole, inside if token.kind == "(" and whole == text else None)
        return _Factor(self._with_scripts(token.text))

    def _word(self, token: _Token) -> _Factor:
        """A function, or words as they are up to what is none."""
        following = self._next()
        tight = following is not None and following.gap == 0
        scripted = tight and following.kind in ("_", "^", "above", "below")  # type: ignore[union-attr]
        if token.text in _FUNCTIONS or scripted or (tight and self._kind() in "([{"):
            name = rf"\{token.text}" if token.text in _MACROS else rf"\operatorname{{{token.text}}}"
            return _Factor(self._with_scripts(name))
        words = [token.text]
        while self._kind() == "word" and self._kind(1) not in ("_", "^", "above", "below", "("):
            if self._next().text in _FUNCTIONS:  # type: ignore[union-attr]
                break
            words.append(self._take().text)
        return _Factor(rf"\text{{ {' '.join(words)} }}")

    def _bracket(self, token: _Token) -> tuple[str, str]:
        """What is in a bracket, and that with the bracket."""
        closing, left, right = _BRACKETS[token.kind]
        self.open.append(token.kind)
        inside = self._statement()
        if self._kind() != closing:
            self._refuse(f"`{token.kind}` is not closed by `{closing}`", token.column)
        self._take()
        self.open.pop()
        return inside, rf"\left{left} {inside} \right{right}"

    def _with_scripts(self, base: str) -> str:
        """With the indices and powers that follow without a space."""
        above, below = "", ""
        while (token := self._next()) is not None and token.gap == 0:
            if token.kind == "above":
                above += self._take().text
            elif token.kind == "below":
                below += self._take().text
            elif token.kind in ("_", "^"):
                self._take()
                text = self._script()
                above, below = (above + text, below) if token.kind == "^" else (above, below + text)
            else:
                break
        return base + (f"_{{{below.strip()}}}" if below else "") + (f"^{{{above.strip()}}}" if above else "")

    def _script(self) -> str:
        """What follows a `_` or `^`: letters and digits, or anything in brackets."""
        token = self._next()
        if token is None or token.gap or token.kind not in ("letter", "word", "number", "symbol", "{", "("):
            self._refuse("an index or a power is missing")
        self.scripts += 1
        if token.kind in ("{", "("):
            text = self._bracket(self._take())[0]
        else:
            text, gap = "", 0
            while not gap and self._kind() in ("letter", "word", "number", "symbol"):
                piece = self._take()
                roman = piece.kind == "word" and len(piece.text) > 2 and not set(piece.text) <= set("hijkl")
                text += rf"\mathrm{{{piece.text}}}" if roman else f"{piece.text} "
                following = self._next()
                gap = following.gap if following else 1
        self.scripts -= 1
        return text.strip() + (" " if text else "")

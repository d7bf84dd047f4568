"""Equations of cards, and the LaTeX that is made of them."""

import re
import unicodedata

import pytest

from attnzoo.catalogue.equations import latex
from attnzoo.errors import ZooError
from attnzoo.zoo import Zoo

ZOO = Zoo.of()
CLASSES = {
    name: entry.value for registry in (ZOO.mechanisms, ZOO.fusions) for name, entry in registry.items()
}
EVERYWHERE = set("qkvxsdnmchijlWσρ")
"""Letters that mean the same in all equations; the docstring says what any other means."""

CASES = [
    ("softmax(q kᵀ / √d) v", r"\operatorname{softmax} \left( \frac{q k^{\top}}{\sqrt{d}} \right) v"),
    ("Σ_k a_k", r"\sum_{k} a_{k}"),
    ("Π_{i>1} a_i", r"\prod_{i > 1} a_{i}"),
    ("φ(q) (φ(k)ᵀ v)", r"\varphi \left( q \right) \left( \varphi \left( k \right)^{\top} v \right)"),
    ("F⁻¹ x̂ k̃' q̄₁ w²", r"F^{-1} \hat{x} \tilde{k}^{\prime} \bar{q}_{1} w^{2}"),
    ("W_out W_QK W_O^he x_{i, j + 1} 2^(−8)", r"W_{\mathrm{out}} W_{QK} W_{O}^{he} x_{i , j + 1} 2^{- 8}"),
    ("r^v_{i−j}", "r_{i - j}^{v}"),
    ("A_hij A_ij", "A_{hij} A_{ij}"),
    # above a fraction is all since the last sum; below it what stands together
    ("a b / c d", r"\frac{a b}{c} d"),
    ("π (i − j) / 2M", r"\frac{\pi \left( i - j \right)}{2 M}"),
    ("1/k Σ_i w ⊙ a_i / √(b + ε)", r"\frac{1}{k} \sum_{i} \frac{w \odot a_{i}}{\sqrt{b + \varepsilon}}"),
    ("(a + b) / (c + d)", r"\frac{a + b}{c + d}"),
    ("(a + b)² / c", r"\frac{\left( a + b \right)^{2}}{c}"),
    ("a / b / c", r"\frac{\frac{a}{b}}{c}"),
    ("x^(1/4)", "x^{1/4}"),
    ("a + b / c − d", r"a + \frac{b}{c} - d"),
    ("∂o_i / ∂x_j", r"\frac{\partial o_{i}}{\partial x_{j}}"),
    # bars open and close
    ("m |i − j| v", r"m \left\lvert i - j \right\rvert v"),
    ("‖x‖² |a|", r"\left\lVert x \right\rVert^{2} \left\lvert a \right\rvert"),
    (
        "|‖x‖ − √|y||",
        r"\left\lvert \left\lVert x \right\rVert - \sqrt{\left\lvert y \right\rvert} \right\rvert",
    ),
    ("| |a| − b|", r"\left\lvert \left\lvert a \right\rvert - b \right\rvert"),
    ("⌊h g / 2⌋", r"\left\lfloor \frac{h g}{2} \right\rfloor"),
    ("[z − τ]₊²", r"\left[ z - \tau \right]_{+}^{2}"),
    ("[a_1; …; a_k]", r"\left[ a_{1} ; \dots ; a_{k} \right]"),
    ("{i + r : |r| ≤ w} ∪ N", r"\left\{ i + r : \left\lvert r \right\rvert \leq w \right\} \cup N"),
    # functions and words
    (
        "norm'(x) + MLP(x)",
        r"\operatorname{norm}^{\prime} \left( x \right) + \operatorname{MLP} \left( x \right)",
    ),
    ("max_i(a_i)", r"\max_{i} \left( a_{i} \right)"),
    ("v within each window", r"v \text{ within each window }"),
    ("a = b,  c", r"a = b ,\quad c"),
    ("A v\nA = B\n0", r"\begin{split} & A v \\ A &= B \\ & 0 \end{split}"),
]
FAULTS = [
    ("", 1, 1, "empty line"),
    ("x\n\ny", 2, 1, "empty line"),
    ("q & k", 1, 3, "ampersand"),
    ("q\\top", 1, 2, "reverse solidus"),
    ("q\tk", 1, 2, "not in the notation"),
    ("é", 1, 1, "the mark"),
    ("(q", 1, 1, "is not closed"),
    ("x\n(q] + 1", 2, 1, "is not closed"),
    ("q)", 1, 2, "closes nothing"),
    ("|q", 1, 1, "is not closed"),
    ("q +", 1, 4, "missing at the end"),
    ("(q +) v", 1, 5, "missing here"),
    ("a = = b", 1, 5, "nothing to its left"),
    (", a", 1, 1, "nothing to its left"),
    ("a · = b", 1, 5, "missing here"),
    ("· b", 1, 1, "nothing to its left"),
    ("/ a", 1, 1, "nothing above"),
    ("a /", 1, 4, "nothing below"),
    ("a / Σ b", 1, 5, "nothing below"),
    ("Σ_i", 1, 4, "of nothing"),
    ("√", 1, 2, "of nothing"),
    ("∂ + x", 1, 3, "of nothing"),
    ("_i", 1, 1, "belongs to nothing"),
    ("q ^2", 1, 3, "belongs to nothing"),
    ("q_", 1, 3, "is missing"),
    ("q_ i", 1, 4, "is missing"),
    ("(" * 2000 + "x" + ")" * 2000, 1, 42, "too deeply"),
    ("√" * 2000 + "x", 1, 42, "too deeply"),
]


@pytest.mark.parametrize("equation,expected", CASES)
def test_hand_cases(equation, expected):
    assert latex(equation) == expected


@pytest.mark.parametrize("equation,line,column,match", FAULTS)
def test_what_is_not_in_the_notation_is_refused_where_it_stands(equation, line, column, match):
    with pytest.raises(ZooError, match=match) as error:
        latex(equation)
    place = error.value.diagnostics[0].place
    assert error.value.code == "AZ977"
    assert (place.line, place.column) == (line, column), str(error.value)


@pytest.mark.parametrize("name", CLASSES)
def test_every_builtin_has_an_equation_that_a_person_can_read(name):
    """It converts, is as narrow as a terminal, begins with what comes out, and its letters stand in the docstring."""
    cls = CLASSES[name]
    equation = cls.card.equation
    lines = equation.split("\n")
    assert latex(equation) and max(map(len, lines)) <= 76
    assert not re.search(r"[=←]", re.sub(r"_\{.*?\}", "", lines[0])), "the first line is what comes out"
    text, doc = (unicodedata.normalize("NFD", part) for part in (equation, cls.__doc__))
    said = set(re.findall(r"(?<![^\W\d_])[^\W\d_](?![a-z])", doc)) | set(re.findall(r"[Δδ∂](?=[a-z])", doc))
    used = set(re.findall(r"(?<![^\W\d_])[^\W\d_](?![a-z])", re.sub(r"[_^][A-Za-z]+", "", text)))
    given = {line[0] for line in lines[1:]} | set(re.findall(r",  (.)", equation))
    assert used - said - given - EVERYWHERE - set("ᵀΣΠ₁₂") == set()


def test_latex2mathml_reads_all():
    convert = pytest.importorskip("latex2mathml.converter", reason="latex2mathml is not installed").convert
    for name, cls in CLASSES.items():
        made = convert(latex(cls.card.equation))
        assert made.startswith("<math") and "\\" not in made and "<mi>&</mi>" not in made, name

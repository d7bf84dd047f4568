"""Formulas of cards: what they may name, what they give, what is said where they cannot be computed."""

import pytest

from attnzoo.core import Layout, Site, evaluate
from attnzoo.zoo import Zoo

MECHANISMS = Zoo.of().mechanisms

SITE = Site("blocks.3", dim=12, heads=3, layout=Layout((2, 5), prefix=1), layer=3, qkv_bias=False)
ACROSS = Site("cross", 12, 3, Layout((4,)), context_dim=7, context_layout=Layout((3, 2), prefix=1))


@pytest.mark.parametrize(
    "text,wanted",
    [
        ("n * c + m", 11 * 12 + 11),
        ("h * d - e", 0),
        ("p + layer + sides[0] * 100 + sides[1]", 1 + 3 + 205),
        ("qkv_bias * 3 * c + proj_bias * c", 12),
        ("2 * rank * n if share == 'headwise' else 0", 2 * 4 * 11),
        ("sum(ceil(side / rank) for side in sides)", 1 + 2),
        ("prod(sides) // rank + max(min(n, rank), 1)", 2 + 4),
    ],
)
def test_values(text, wanted):
    assert evaluate(text, SITE, {"rank": 4, "share": "headwise"}) == wanted


def test_a_context_has_letters_of_its_own():
    assert evaluate("n + 100 * m + 10000 * e", ACROSS, {}) == 4 + 700 + 70000
    assert evaluate("context", ACROSS, {}) == 1 and evaluate("context", SITE, {}) == 0
    assert evaluate("prod(context_sides) - prod(sides)", ACROSS, {}) == 6 - 4


@pytest.mark.parametrize(
    "text,said",
    [
        ("rnk * n", "name 'rnk' is not defined; known are n, m, c, .*, rank"),
        ("n / rank", "gives 2.75, which is no whole number"),
        ("n / 0", "division by zero"),
        ("sides[2]", "out of range"),
        ("n * share(1)", "cannot be computed"),
        ("open('x')", "name 'open' is not defined"),
    ],
)
def test_faults_name_the_formula(text, said):
    with pytest.raises(ValueError, match=said) as caught:
        evaluate(text, SITE, {"rank": 4, "share": "headwise"})
    assert f"`{text}`" in str(caught.value)


@pytest.mark.parametrize("name", sorted(MECHANISMS))
def test_every_mechanism_of_the_zoo_states_its_parameters_and_flops(name):
    card = MECHANISMS[name].value.card
    assert card.params and card.flops, f"{name}: `params` and `flops` of its card are formulas"

"""Cards: what can be claimed, and what is refused."""

import re
from dataclasses import FrozenInstanceError, replace

import pytest

from attnzoo.core import Card, Family, FusionCard, Law, Paper
from attnzoo.core.card import FUSION_LAWS, MASK_KINDS, MECHANISM_LAWS
from attnzoo.zoo import load_zoo


def card(**fields) -> Card:
    """The smallest card, and these fields."""
    return Card(**{"name": "probe", "family": Family.MIXING, "summary": "One line."} | fields)


def fusion_card(**fields) -> FusionCard:
    """The smallest card of a fusion, and these fields."""
    return FusionCard(**{"name": "probe", "summary": "One line."} | fields)


BAD = [
    ({"name": "Softmax"}, "snake_case"),
    ({"name": "soft-max"}, "snake_case"),
    ({"name": "1soft"}, "snake_case"),
    ({"name": "soft\n"}, "snake_case"),
    ({"name": ""}, "snake_case"),
    ({"name": "a" * 65}, "at most 64"),
    ({"summary": ""}, "summary is one line"),
    ({"summary": "One.\nTwo."}, "summary is one line"),
    ({"fidelity": "adapted"}, "needs notes"),
    ({"fidelity": "inspired"}, "needs notes"),
    ({"fidelity": "roughly", "notes": "It differs."}, "fidelity is one of"),
]
"""What neither kind of card may say."""
BAD_MECHANISM = [
    ({"laws": {Law.SYMMETRIC}}, "symmetric is no law"),
    ({"params": "4 c c"}, "`4 c c` is no formula"),
    ({"flops": "n *"}, r"`n \*` is no formula"),
    ({"masks": {"padding"}}, "padding.* is no kind of mask"),
    ({"masks": {"keys", "Causal"}}, "is no kind of mask"),
    ({"incremental": True}, "needs a causal mask"),
    ({"incremental": True, "masks": {"keys"}}, "needs a causal mask"),
    ({"laws": {Law.STOCHASTIC}}, "needs a tap called `weights`"),
    ({"laws": {Law.SUBSTOCHASTIC}}, "needs a tap called `weights`"),
    ({"taps": {"weights": "b h n q"}}, "are not shape letters"),
    ({"taps": {"weights": "b h n n"}}, "are not shape letters, each once"),
    ({"grid": 2, "given": {"regions": "colours"}}, "with `labels` or `scores`, not 'colours'"),
    ({"grid": 2, "given": {"two words": "labels"}}, "given is a name"),
    ({"given": {"regions": "labels"}}, "`grid` must be claimed"),
]


@pytest.mark.parametrize("fields,match", BAD + BAD_MECHANISM)
def test_incoherent_claims_of_a_mechanism_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        card(**fields)


@pytest.mark.parametrize("fields,match", [*BAD, ({"laws": {Law.STOCHASTIC}}, "stochastic is no law")])
def test_incoherent_claims_of_a_fusion_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        fusion_card(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "a" * 64},
        {"name": "x2_y"},
        {"fidelity": "adapted", "notes": "It differs."},
        {"incremental": True, "masks": {"causal"}},
        {"laws": {Law.STOCHASTIC}, "taps": {"weights": "b h n m"}},
        {"masks": set(MASK_KINDS)},
        {"grid": "any"},
    ],
)
def test_coherent_claims_are_taken(fields):
    made = card(**fields)
    for name, value in fields.items():
        assert getattr(made, name) == value


@pytest.mark.parametrize("arity", [(0, None), (2, 1), (0, 0)])
def test_a_fusion_merges_some_number_of_branches(arity):
    with pytest.raises(ValueError, match="no number of branches"):
        fusion_card(arity=arity)
    assert fusion_card(arity=(2, 2)).arity == (2, 2)


def test_changing_a_card_is_held_to_the_same_rules():
    made = card(masks={"causal"}, incremental=True)
    with pytest.raises(ValueError, match="causal mask"):
        replace(made, masks=frozenset({"keys"}))
    with pytest.raises(FrozenInstanceError):
        made.name = "other"


@pytest.mark.parametrize(
    "change",
    [
        lambda taps: taps.update(scores="b h n m"),
        lambda taps: taps.pop("weights"),
        lambda taps: taps.popitem(),
        lambda taps: taps.setdefault("scores", "b h n m"),
        lambda taps: taps.__setitem__("weights", "b n"),
        lambda taps: taps.__delitem__("weights"),
        lambda taps: taps.__ior__({"scores": "b h n m"}),
    ],
)
def test_mappings_are_kept_frozen(change):
    made = card(taps={"weights": "b h n m"})
    with pytest.raises(TypeError, match=r"replace\(card"):
        change(made.taps)
    assert made.taps == {"weights": "b h n m"}


def test_sets_are_kept_frozen():
    made = card(masks={"keys"}, laws=[Law.PERMUTATION_EQUIVARIANT], extra={"fla"})
    assert all(isinstance(getattr(made, name), frozenset) for name in ("masks", "laws", "extra"))
    assert isinstance(fusion_card(laws={Law.AGREE}).laws, frozenset)
    assert hash(made) == hash(card(masks={"keys"}, laws={Law.PERMUTATION_EQUIVARIANT}, extra={"fla"}))


def test_every_law_belongs_to_one_kind_of_part():
    assert frozenset(Law) == MECHANISM_LAWS | FUSION_LAWS and not MECHANISM_LAWS & FUSION_LAWS
    assert Law.LOCAL in MECHANISM_LAWS and Law.SINGLE in FUSION_LAWS and Law.TOKEN_LOCAL in FUSION_LAWS


@pytest.mark.parametrize(
    "time,growth,grows",
    [
        ("c", 0, "O(1)"),
        ("n c", 1, "O(n)"),
        ("m c", 1, "O(n)"),
        ("n m c", 2, "O(n²)"),
        ("n w² c", 1, "O(n)"),
        ("n c + n m d", 2, "O(n²)"),
        ("n m d + n c", 2, "O(n²)"),
        ("n² m", 3, "O(n³)"),
        ("n² m²", 4, "O(n⁴)"),
        ("n c log(n)", 1, "O(n log n)"),
    ],
)
def test_growth(time, growth, grows):
    made = card(time=time)
    assert made.growth == growth and made.grows == grows


def test_every_family_asks_a_question():
    questions = [family.question for family in Family]
    assert len(set(questions)) == len(Family) and all(questions)


def test_a_paper_as_text():
    assert (
        str(Paper("Title", "Hu et al.", 2018, "arXiv:1", where="§3")) == "Hu et al., Title, 2018, arXiv:1, §3"
    )
    assert str(Paper("Title", "Hu", 2018, "arXiv:1")) == "Hu, Title, 2018, arXiv:1"


@pytest.mark.parametrize(("context", "said"), [(True, "yes"), ("beside", "beside"), (False, None)])
def test_a_card_in_a_notebook_says_whether_there_is_a_context(context, said):
    text = replace(load_zoo().mechanisms["softmax"].card, context=context)._repr_html_()
    found = re.search(r"context</t[hd]>\s*<td[^>]*>([^<]*)<", text)
    assert (found and found[1]) == said

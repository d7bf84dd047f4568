"""What notebooks show: cards, recipes and compositions as HTML, in which whatever is said is text."""

import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any

import pytest

from attnzoo.core import Card, Family, FusionCard, Law, Paper
from attnzoo.recipe import load, resolve
from attnzoo.zoo import load_zoo

MARKUP = "<script>alert('&')</script>"


def shown(thing: Any) -> tuple[str, dict[str, str], str]:
    """Title, facts by name and the text below; the HTML is well formed."""
    page = ET.fromstring(f"<div>{thing._repr_html_()}</div>")
    facts = {"".join(row[0].itertext()): "".join(row[1].itertext()) for row in page.iter("tr")}
    return page.findtext("b"), facts, page.findtext("pre") or ""


def test_a_card_is_its_claims():
    paper = Paper("All You Need", "Vaswani et al.", 2017, "arXiv:1706.03762", "section 3.2")
    card = Card(
        "mine", Family.LINEAR, "S = q k", paper, time="n c + n d", masks={"keys", "causal"}, context="beside",
        taps={"weights": "b h n m"}, laws={Law.STOCHASTIC, Law.BOUNDED}, params="2 * n", honours={"rotary", "qk_norm"},
        notes="none", grid=2, given={"regions": "labels"}, one_head=True,
    )  # fmt: skip
    title, facts, _ = shown(card)
    assert title == "mine" and "<p>S = q k</p>" in card._repr_html_()
    assert facts == {
        "family": "linear: how to avoid n × m?",
        "paper": "Vaswani et al., All You Need, 2017, arXiv:1706.03762, section 3.2",
        "fidelity": "exact",
        "time": "n c + n d, O(n)",
        "memory": "h n m",
        "parameters": "2 * n",
        "masks": "causal, keys",
        "heads": "one",
        "context": "beside",
        "grid": "2",
        "given": "regions (labels)",
        "projections": "of its own; honours qk_norm, rotary",
        "taps": "weights (b h n m)",
        "laws": f"stochastic: {Law.STOCHASTIC.meaning}; bounded: {Law.BOUNDED.meaning}",
        "notes": "none",
    }
    bare = shown(Card("bare", Family.MIXING, "nothing"))[1]
    assert list(bare) == ["family", "fidelity", "time", "memory", "masks"] and bare["masks"] == "none"
    assert shown(replace(card, context=True))[1]["context"] == "yes"


def test_a_fusion_card_is_its_claims():
    card = FusionCard("both", "a + b", laws={Law.SYMMETRIC}, arity=(2, None), inside_heads=False)
    title, facts, _ = shown(card)
    assert title == "both" and facts["branches"] == "2 or more" and facts["level"] == "on tokens only"
    assert facts["laws"] == f"symmetric: {Law.SYMMETRIC.meaning}"
    assert shown(FusionCard("two", "a", arity=(1, 2)))[1]["branches"] == "1 to 2"


def test_every_card_can_be_shown():
    zoo = load_zoo()
    for entry in (*zoo.mechanisms.values(), *zoo.fusions.values()):
        title, facts, _ = shown(entry.value.card)
        assert title == entry.value.card.name and facts["fidelity"] and all(facts.values())


@pytest.mark.parametrize("name", ["ham_b", "deep_head", "recall"])
def test_a_recipe_is_its_text_and_a_composition_what_is_put_where(name):
    loaded = load(name)
    title, facts, text = shown(loaded)
    assert (
        title == name and facts["model"] == loaded.recipe.host.kind and facts["file"].endswith(f"{name}.yaml")
    )
    assert load(text).recipe == loaded.recipe  # it is a whole recipe
    composition = resolve(loaded)
    title, facts, _ = shown(composition)
    put = {site: formula for sites, formula in facts.items() for site in sites.split(", ")}
    assert title == name
    assert {site: put[site] for site in composition.plans} == {
        s: str(p) for s, p in composition.plans.items()
    }
    assert ("pool" in facts) == (composition.pool is not None)


def test_an_edited_recipe_says_so():
    assert shown(load("ham_b", ["host.model.depth=2"]))[1]["file"].endswith(", edited")


def test_what_is_said_is_no_markup():
    loaded = load("ham_b", [f"summary={MARKUP!r}"])
    for thing in (
        Card("c", Family.LINEAR, MARKUP, notes=MARKUP),
        FusionCard("c", MARKUP, notes=MARKUP),
        loaded,
        resolve(loaded),
    ):
        html = thing._repr_html_()
        assert "<script" not in html and "&lt;script&gt;" in html and "'&amp;'" in html.replace("&#x27;", "'")

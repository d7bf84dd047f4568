"""`list_*`, `show` and `describe`: the zoo and its models in words, as the command line has them."""

import copy
import json
import pickle
import pydoc
import re

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import attnzoo
from attnzoo.cli.app import app
from attnzoo.core import Fused, Layout, MultiHead, Site
from attnzoo.errors import ZooError
from attnzoo.fusions.add import Add
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.mechanisms.projection.grouped_query import GroupedQuery
from attnzoo.zoo import load_zoo


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False).stdout


# --- list


@pytest.mark.parametrize(
    "filters",
    [
        {}, {"family": "linear"}, {"mask": "causal"}, {"law": "stochastic"}, {"context": True}, {"context": False},
        {"form": "head"}, {"form": "mechanism"}, {"form": "pool"}, {"plugin": "attnzoo"}, {"pattern": "*lin*"},
        {"pattern": "attnzoo/s*"}, {"pattern": "*lin*", "mask": "causal"}, {"family": "linear", "form": "head", "context": True},
    ],
    ids=str,
)  # fmt: skip
def test_python_and_the_command_line_list_the_same(filters):
    flags = []
    for name, value in filters.items():
        flag = {"pattern": "name"}.get(name, name)
        flags += [f"--{'' if value else 'no-'}context"] if name == "context" else [f"--{flag}", value]
    rows = json.loads(run("list", "mechanisms", "--json", *flags))["mechanisms"]
    assert (
        attnzoo.list_mechanisms(**filters)
        == [row["name"] for row in rows]
        == sorted(row["name"] for row in rows)
    )
    for name in attnzoo.list_mechanisms(**filters):
        card = load_zoo().mechanisms[name].value.card
        assert filters.get("family") in (None, card.family) and filters.get("context") in (
            None,
            bool(card.context),
        )
        assert filters.get("mask") in (None, *card.masks) and filters.get("law") in (None, *card.laws)


def test_lists_hold_what_they_should():
    every = attnzoo.list_mechanisms()
    assert every == sorted(load_zoo().mechanisms)
    assert attnzoo.list_mechanisms("*lin*", mask="causal") == ["elu_linear", "gated_linear"]
    assert "softmax" in attnzoo.list_mechanisms("s*", form="head", context=True)
    assert "softmax" not in attnzoo.list_mechanisms(form="mechanism")
    assert sorted(sum((attnzoo.list_mechanisms(form=f) for f in ("head", "mechanism", "pool")), [])) == every
    assert sorted(attnzoo.list_mechanisms(context=True) + attnzoo.list_mechanisms(context=False)) == every
    assert attnzoo.list_mechanisms("nosuch*") == []
    assert attnzoo.list_mechanisms(search="VASWANI 2017") == ["softmax"]  # of the paper
    assert (
        attnzoo.list_mechanisms(search="linear zebra windows")
        == []
        != attnzoo.list_mechanisms(search="window")
    )
    of_timm = attnzoo.list_mechanisms("s*", search="timm")
    assert "squeeze_excite" in of_timm and "softmax" not in of_timm
    assert attnzoo.list_fusions(law="convex") == [
        "attentional",
        "by_depth",
        "gated",
        "max",
        "mean",
        "selective",
    ]
    assert attnzoo.list_recipes("ham_?") == ["ham_a", "ham_b"]
    assert attnzoo.list_recipes(plugin="attnzoo") == attnzoo.list_recipes() == sorted(load_zoo().recipes)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: attnzoo.list_mechanisms(family="liner"), "did you mean `linear`"),
        (lambda: attnzoo.list_mechanisms(mask="casual"), "did you mean `causal`"),
        (lambda: attnzoo.list_mechanisms(law="stochastc"), "did you mean `stochastic`"),
        (lambda: attnzoo.list_mechanisms(law="convex"), "no law of mechanisms"),
        (lambda: attnzoo.list_mechanisms(form="heads"), "did you mean `head`"),
        (lambda: attnzoo.list_mechanisms(context="yes"), "True, False"),
        (lambda: attnzoo.list_mechanisms(plugin="attnzo"), "did you mean `attnzoo`"),
        (lambda: attnzoo.list_fusions(law="local"), "no law of fusions"),
        (lambda: attnzoo.list_fusions(plugin="nobody"), "no plugin"),
        (lambda: attnzoo.list_recipes(plugin="nobody"), "no plugin"),
    ],
)
def test_an_unknown_filter_is_an_error_with_a_hint(call, said):
    with pytest.raises(ZooError, match=re.escape(said)) as caught:
        call()
    assert caught.value.code == "AZ605"


@pytest.mark.parametrize("flags", [("--form", "heads"), ("--plugin", "nobody"), ("--family", "liner")])
def test_the_command_line_refuses_the_same(flags):
    result = CliRunner().invoke(app, ["list", "mechanisms", *flags])
    assert result.exit_code == 2 and "AZ605" in result.output


def test_what_claims_no_laws_meets_none():
    found = json.loads(run("list", "--law", "stochastic", "--json"))
    assert found["recipes"] == found["fusions"] == [] and "softmax" in [
        row["name"] for row in found["mechanisms"]
    ]


# --- show


@pytest.mark.parametrize("name", ["softmax", "neighborhood", "add", "head_split", "attnzoo/soft", "fourier"])
def test_show_says_what_the_command_line_says(name):
    page = attnzoo.show(name)
    printed = run("show", name).partition("next:")[0]
    words = set(re.findall(r"[^\s─]+", printed))
    assert words <= set(str(page).split()) and len(words) > 20
    assert repr(page) == str(page) and max(map(len, str(page).splitlines())) <= 120
    html = page._repr_html_()
    assert html.count("<table>") >= 1 and "<script" not in html
    for word in ("from", "fidelity"):
        assert f">{word}<" in html


def test_show_of_a_recipe_is_its_text():
    text = load_zoo().recipes["ham_a"].value.read_text(encoding="utf-8").rstrip()
    assert str(attnzoo.show("ham_a")).endswith(text) and text in run("show", "ham_a")
    with pytest.raises(ZooError, match="did you mean `softmax`"):
        attnzoo.show("sofmax")


def test_what_is_written_in_a_card_is_no_markup():
    from attnzoo.catalogue.text import Sheet, Table

    sheet = Sheet("<b>a</b>", ("x < y", Table([["<i>", "&"]], ["1", "<td>"])))
    assert (
        "<i>" not in sheet._repr_html_()
        and "&lt;i&gt;" in sheet._repr_html_()
        and "x &lt; y" in sheet._repr_html_()
    )
    assert "<i>" in str(sheet)


def test_text_is_wrapped_between_words():
    from attnzoo.catalogue.text import Table

    text = str(Table([["name", " ".join(["word"] * 60)], ["n", "one-" * 40]]))
    assert {word for word in text.split() if word.startswith("w")} == {"word"} and "one-" * 40 in text
    assert all(line.startswith(("name  word", "      ", "n     ")) for line in text.splitlines())


# --- describe


def lines(model):
    return str(attnzoo.describe(model)).splitlines()


def test_a_composed_backbone_is_described():
    text = lines(timm.create_model("ham_vit_b"))
    assert text[0] == "ham_b: ZooVisionTransformer, 121 786 parameters"
    assert "takes 3 × 32 × 32 image → 8 × 8 + 1 tokens" in text
    (row,) = [line for line in text if line.startswith("blocks")]
    assert row == "blocks.0 … blocks.3 (4)  add(softmax, soft[variant=pooled])  10 080 parameters each"


def test_different_sites_are_told_apart():
    text = lines(attnzoo.compose("local_then_global"))
    assert [line.split("  ")[0] for line in text[4:]] == [
        "blocks.0 … blocks.7 (8)", "blocks.8 … blocks.9 (2)", "blocks.10 … blocks.11 (2)"]  # fmt: skip
    recipe = {"recipe": 1, "host": {"kind": "sequence", "layers": 4}, "attention": "softmax",
              "overrides": [{"at": "layers.1", "put": "elu_linear"}]}  # fmt: skip
    rows = [line.split()[0] for line in lines(attnzoo.compose(recipe)) if line.startswith("layers")]
    assert rows == ["layers.0", "layers.1", "layers.2"]


def test_models_of_sequences_are_described():
    text = lines(attnzoo.compose("transformer"))
    assert text[0].startswith("transformer: Seq2Seq, ") and "takes source, at most" in text[2]
    assert [line.split("  ")[0] for line in text if "softmax" in line] == [
        "encoder.0 … encoder.5 (6)", "decoder.0.self … decoder.5.self (6)", "decoder.0.cross … decoder.5.cross (6)"]  # fmt: skip
    assert lines(attnzoo.compose("induction"))[2].startswith("takes at most 64 tokens")


def test_what_stands_alone_is_described():
    assert lines(attnzoo.create("softmax", 8, 2, grid=(2, 3))) == [
        "softmax: Alone, 288 parameters", "", "takes tokens (b 6 8)", "", "attn  softmax  288 parameters"]  # fmt: skip
    text = lines(attnzoo.create({"fuse": "add", "of": ["softmax", "soft"]}, 8, 2, form="map"))
    assert text[0].startswith("add(softmax, soft): FeatureMap") and text[2] == "takes maps (b 8 y x)"
    assert lines(attnzoo.as_mha("softmax", 8, 2))[2] == "takes queries, keys and values (n b 8)"


def test_a_network_with_some_is_described():
    net = timm.create_model("resnet18")
    assert lines(net)[-1] == "no mechanism of the zoo is in it"
    net.layer4[0].conv2 = attnzoo.create("softmax", 512, 8, form="map")
    assert lines(net)[-1].split("  ")[:2] == ["layer4.0.conv2.attn", "softmax"]
    two = nn.ModuleDict(
        {
            "eyes": attnzoo.compose("ham_a"),
            "ears": attnzoo.compose("induction"),
            "more": attnzoo.create("softmax", 8),
        }
    )
    text = lines(two)
    assert text[0].startswith("ham_a + induction: ModuleDict")
    assert [line.split()[0] for line in text if "parameters" in line][1:] == [
        "eyes.blocks.0",
        "ears.layers.0",
        "more.attn",
    ]
    assert lines(nn.Linear(2, 2)) == ["Linear, 6 parameters", "", "no mechanism of the zoo is in it"]


def test_copies_and_wrappers_are_described_like_the_model():
    model = attnzoo.compose("ham_a")
    same = lines(model)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),  # noqa: S301 - our own bytes
        torch.compile(model),
        nn.DataParallel(model),
    ):
        assert lines(other) == same
    features = timm.create_model("ham_vit_b", features_only=True)
    assert lines(features)[0].startswith("ham_b: ") and any(
        "blocks.0 … blocks.3 (4)" in line for line in lines(features)
    )


def test_what_has_changed_is_described_as_it_is():
    model = timm.create_model("vit_ham_b_tiny_patch16_224", depth=2)
    model.set_input_size(img_size=(64, 96))
    assert "takes 3 × 64 × 96 image" in lines(model)
    model.blocks[1].attn = nn.Identity()
    assert [line.split()[0] for line in lines(model) if line.startswith("blocks")] == ["blocks.0"]


def test_what_was_built_by_hand_is_described():
    site = Site("mine", 8, 2, Layout((4,)))
    by_hand = Fused(site, Add, [lambda site: MultiHead(site, Softmax(site)), GroupedQuery])
    assert "add(softmax, grouped_query)" in lines(nn.Sequential(by_hand))[-1]
    assert "softmax" in lines(MultiHead(site, Softmax(site)))[-1]


def test_only_models_are_described():
    with pytest.raises(ZooError, match="not a str") as caught:
        attnzoo.describe("ham_a")
    assert caught.value.code == "AZ112"


# --- help


def test_help_shows_first_what_most_people_want():
    text = pydoc.plain(pydoc.render_doc(attnzoo))
    places = [
        text.index(f" {name}(")
        for name in ("create", "as_mha", "compose", "list_mechanisms", "show", "describe")
    ]
    assert places == sorted(places) and places[-1] < text.index("PACKAGE CONTENTS")
    assert set(dir(attnzoo)) == set(attnzoo.__all__)

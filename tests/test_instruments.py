"""What probes and interventions have in common: how they are written, what they refuse, what they leave behind."""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from instruments import images, subject, vit

import attnzoo
from attnzoo.core import InstrumentCard, Probe
from attnzoo.core.instrument import NEEDS, made, read_call
from attnzoo.core.options import options_of
from attnzoo.errors import PluginError, ZooError
from attnzoo.interventions import AblateHeads
from attnzoo.lab.finding import Finding
from attnzoo.lab.points import leaves
from attnzoo.lab.subject import Batch, Subject
from attnzoo.probes import Entropy

ZOO = attnzoo.load_zoo()
EVERY = [entry.value for registry in (ZOO.probes, ZOO.interventions) for entry in registry.values()]
FUSED = "{fuse: add, of: [softmax, {use: soft}]}"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("entropy", ("entropy", {})),
        (" entropy() ", ("entropy", {})),
        (
            'a(at="x/y", heads=[0, 2], s=-0.5, b=None)',
            ("a", {"at": "x/y", "heads": [0, 2], "s": -0.5, "b": None}),
        ),
        ("my-plugin/a(b=1)", ("my-plugin/a", {"b": 1})),
    ],
)
def test_a_call_is_read(text, wanted):
    assert read_call(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a(1)",
        "a(b=c)",
        "a(b=open('x'))",
        "a.b()",
        "a()()",
        "a(**{})",
        "a(b=1",
        "a b",
        "(" * 9999,
        "a(b=[1)",
    ],
)
def test_what_is_no_call_is_refused_and_never_run(text):
    with pytest.raises(ZooError, match="AZ922"):
        read_call(text)


@pytest.mark.parametrize(("options", "said"), [({"tokens": 3}, "tokens"), ({"token": "all"}, "did you mean")])
def test_options_that_cannot_be_are_refused_by_name(options, said):
    with pytest.raises(ZooError, match="AZ921") as error:
        made(Entropy, options)
    assert said in str(error.value)


def test_it_is_written_as_it_was_made():
    for text in ("ablate_heads", "ablate_heads(at='blocks.1', heads=[0], by='mean')"):
        name, options = read_call(text)
        assert str(made(ZOO.interventions[name].value, options)) == text


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.card.name)
def test_a_card_is_complete_and_its_options_are_documented(cls):
    assert cls.card.needs <= NEEDS.keys() and cls.card.equation and cls.card.summary.endswith(".")
    fields = options_of(cls).model_fields
    assert all(field.description for field in fields.values()), cls
    assert cls.__name__.lower() == cls.card.name.replace("_", "")
    assert cls.__module__.rpartition(".")[2] == cls.card.name


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.card.name)
def test_it_has_a_file_of_tests_of_its_own(cls):
    folder = "probes" if issubclass(cls, Probe) else "interventions"
    assert (Path(__file__).parent / folder / f"test_{cls.card.name}.py").read_text().count("def test_") >= 2


def test_a_table_is_what_people_expect():
    found = Finding.of(
        [{"layer": 0, "site": "a", "branch": "", "head": h, "x": x} for h, x in enumerate([1, math.nan, 3])]
    )
    assert len(found) == 3 and found["x"][2] == 3 and found.shows == "x"
    assert [row["head"] for row in found.sorted()] == [2, 0, 1]
    np.testing.assert_array_equal(found.matrix(), [[1, np.nan, 3]])
    read = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [row["head"] for row in read] == ["0", "1", "2"]
    assert "<td>–</td>" in found._repr_html_() and "–" in str(found)
    assert found.as_dict()["columns"]["x"] == [1, None, 3]


def test_a_table_escapes_what_it_quotes():
    found = Finding({"<b>": ["<script>"]}, notes=["a < b"])
    assert "<script>" not in found._repr_html_() and "&lt;b&gt;" in found._repr_html_()


def test_columns_of_different_lengths_are_no_table():
    with pytest.raises(ValueError, match="no table"):
        Finding({"a": [1], "b": [1, 2]})


def test_a_probe_leaves_a_model_as_it_was():
    model = vit(FUSED)
    model.train()
    x = images()
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    attnzoo.probe(model, "entropy", inputs=x)
    assert torch.equal(torch.rand(1), wanted) and model.training
    assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_probe_sees_what_an_intervention_changed():
    model = vit()
    with attnzoo.intervene(model, AblateHeads(at="blocks.0", heads=[1])):
        heads = [found for _, found, _ in Subject.of(model, images()).recorded("heads")]
    (first, second) = ((leaf.layer, t) for (_, leaf), t in heads[0].items())
    assert not first[1][:, 1].any() and first[1][:, 0].any() and second[1].any()


def test_what_is_around_a_site_is_seen_once():
    model = vit(FUSED)
    assert len(leaves(model)) == 4
    for kind, count in (("block", 2), ("output", 2), ("mlp", 2), ("heads", 4)):
        for _, found, _ in Subject.of(model, images(2)).recorded(kind):
            assert len(found) == count, kind


def test_losses_by_hand():
    one = subject(vit())
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]])
    batch = Batch((torch.zeros(2),), torch.tensor([1, 1]))
    assert one.losses(logits, batch).tolist() == pytest.approx([math.log(2), math.log(4 / 3)])
    assert one.shares(logits, batch).tolist() == pytest.approx([0.5, 0.75])
    words = Batch((torch.zeros(1, 3),), torch.tensor([[1, -100, 0]]))
    table = torch.tensor([[[0.0, 0.0], [9.0, 0.0], [0.0, math.log(3.0)]]])
    assert one.losses(table, words).tolist() == pytest.approx([(math.log(2) + math.log(4)) / 2])
    numbers = Batch((torch.zeros(1, 2),), torch.tensor([[[1.0], [math.nan]]]))
    assert one.losses(torch.tensor([[[3.0], [7.0]]]), numbers).tolist() == [4.0]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"name": "Top-K"}, "snake_case"),
        ({"summary": ""}, "the summary is one line"),
        ({"summary": "One line,\nand another."}, "the summary is one line"),
        ({"fidelity": "close"}, "fidelity is one of exact, adapted, inspired"),
        ({"fidelity": "adapted"}, "needs notes"),
        ({"needs": frozenset({"luck"})}, r"\['luck'\] is nothing that can be needed"),
    ],
    ids=str,
)
def test_cards_that_say_nothing_are_refused(wrong, reason):
    with pytest.raises(ValueError, match=reason):
        InstrumentCard(**{"name": "some", "summary": "One line.", **wrong})


@dataclass(kw_only=True, eq=False)
class Odd(Probe):
    """A probe that returns something else."""

    card = InstrumentCard("odd", "For this test.", needs={"labels", "words"})

    def measure(self, subject):
        return {"a": 1}


def test_what_a_probe_needs_is_asked_before_it_runs():
    with pytest.raises(ZooError, match="AZ926"):
        attnzoo.probe(vit(), Odd(), inputs=images())
    with pytest.raises(ZooError, match="AZ927"):
        attnzoo.probe(subject(vit()), Odd())
    with pytest.raises(PluginError, match="AZ014"):
        attnzoo.probe(Subject.of(vit(), images(), torch.zeros(6).long(), kind="sequences"), Odd())


def test_a_model_without_attention_maps_is_refused_with_the_reason():
    with pytest.raises(ZooError, match="AZ924") as error:
        attnzoo.probe(vit("squeeze_excite"), "entropy", inputs=images())
    assert "channels" in str(error.value)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_timms_own_models_are_measured_and_changed_as_ours(name):
    model = timm.create_model(name, img_size=56, depth=2, num_classes=3).eval()
    x = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    plain = model(x)
    found = attnzoo.probe(model, "entropy", inputs=x)
    assert set(found["site"]) == {"blocks.0", "blocks.1"} and 0 < found["share"][0] <= 1
    with attnzoo.intervene(model, "ablate_heads(at='blocks.1')"):
        changed = model(x)
    assert not torch.equal(changed, plain) and torch.equal(model(x), plain)
    assert type(model.blocks[0].attn).__module__.startswith("timm.")

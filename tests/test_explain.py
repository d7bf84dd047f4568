"""`explain`: what is said of a layer is what the layer does."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo.catalogue.equations import latex
from attnzoo.catalogue.explain import Part, explain
from attnzoo.catalogue.recording import Step, record
from attnzoo.core import Card, Family, Head, Layout, Mechanism, MultiHead, Site
from attnzoo.mechanisms.dot_product.softmax import Softmax
from attnzoo.recipe import compose_file
from attnzoo.zoo import Zoo

RECIPES = sorted(Zoo.of().recipes)


def equations(recipe, *edits) -> list[str]:
    """All equations of a recipe."""
    return [line for part in explain(recipe, edits).parts for line in part.equations]


# what is written down is what happens


def replayed(steps: list[Step], section: str, values: dict[Step, torch.Tensor], model: nn.Module):
    """The last value of a section, computed anew from its steps and the values that come into it."""
    for step in (step for step in steps if step.section == section):
        of = [values[one] if one in values else float(one.name) for one in step.of]
        if step.kind == "module":
            module = model.get_submodule(step.name)
            values[step] = of[0] if isinstance(module, Mechanism) else module(*of)
        else:
            values[step] = {"sum": torch.add, "product": torch.mul}[step.kind](*of)
    return values[step]


SMALL = ("host.dim=16", "host.mlp_dim=32", "host.layers=2", "host.vocab=50", "host.max_length=9", "heads=4")
"""A model of sentences, small."""


def vit(base: str, **model) -> dict:
    """A recipe of this base, small."""
    sizes = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 4, **model}
    host = {"kind": "vit", "base": base, "model": sizes}
    return {"recipe": 1, "name": "small", "summary": "Small.", "host": host, "attention": "softmax"}


LAYERS = {
    "pre-norm": ("digits_softmax", "blocks.1", ()),
    "layer scale": (vit("vit_tiny_patch16_224", init_values=0.5), "blocks.1", ()),
    "res-post": (vit("vit_base_patch16_rpn_224"), "blocks.1", ()),
    "eva": (vit("eva02_tiny_patch14_224", img_size=28), "blocks.1", ()),
    "eva post-norm": (vit("eva02_enormous_patch14_clip_224", img_size=28, mlp_ratio=2.0), "blocks.0", ()),
    "cct": ("cct_7_3x1", "blocks.2", ()),
    "seq2seq": ("transformer", "encoder.1", SMALL),
    "seq2seq post-norm": ("transformer", "encoder.1", (*SMALL, "host.norm_first=false")),
    "pyramid": ("pyramid_softmax", "stages.1.blocks.0", ()),
    "shvit": ("pyramid_shvit", "stages.2.blocks.0", ()),
    "halonet": ("pyramid_halonet", "stages.0.blocks.0", ()),
}


@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_the_steps_of_a_layer_computed_anew_give_what_the_layer_gives(layer):
    """Mechanisms hand their tokens on; of all else the steps have to say what the layer's code does."""
    recipe, section, edits = LAYERS[layer]
    composition = compose_file(recipe, edits)
    torch.manual_seed(0)
    model = composition.build(composition.model_cfg()).eval()
    with torch.device("meta"):
        ghost = composition.build(composition.model_cfg()).eval()
    steps = record(ghost, composition.info.sample(), {})
    for module in model.modules():
        if isinstance(module, Mechanism):
            module.forward = lambda x, *_, **__: x.clone()
        if isinstance(module, nn.LayerNorm):  # so that no norm is like another
            nn.init.normal_(module.weight)
    seen = {}
    block = model.get_submodule(section)
    block.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    model(*composition.info.sample())
    into = {of for step in steps if step.section == section for of in step.of if of.section != section}
    (stream,) = {of for of in into if of.kind not in ("parameter", "number")}
    values = {of: model.get_parameter(of.name) for of in into if of.kind == "parameter"}
    assert torch.equal(replayed(steps, section, values | {stream: seen["x"]}, model), seen["out"])


def test_norms_stand_where_the_layer_has_them():
    assert "x ← x + attention(LN(x))" in equations("transformer", *SMALL)
    assert "y ← y + cross(LN(y), x)" in equations("transformer", *SMALL)
    assert "x ← LN(x + attention(x))" in equations("transformer", *SMALL, "host.norm_first=false")
    assert "x ← LN(x + attention(LN(x)))" in equations("cct_7_3x1")
    assert "x ← x + γ_1 ⊙ attention(LN(x))" in equations(LAYERS["layer scale"][0])
    assert "x ← x + LN(attention(x))" in equations(LAYERS["res-post"][0])
    assert "x ← relu(x + up(relu(BN(attention(down(x))))))" in equations("pyramid_halonet")


class Odd(nn.Module):
    """A layer as no host has one."""

    def __init__(self, site: Site):
        super().__init__()
        self.attn, self.norm, self.gate = (
            MultiHead(site, Softmax(site)),
            nn.LayerNorm(site.dim),
            nn.Linear(8, 8),
        )
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        y = self.gate(x)
        return self.drop(2 * y * self.attn(y, layout=Layout((5,))) - self.norm(x[:, 1:2]))


def test_a_layer_that_nobody_has_seen_is_written_down():
    site = Site("blocks.0", 8, 2, Layout((5,)))
    model = nn.Sequential(Odd(site), Odd(site)).to("meta").eval()
    steps = [step for step in record(model, [torch.zeros(1, 5, 8)], {}) if step.section == "0"]
    kinds = [(step.kind, step.name) for step in steps]
    assert kinds == [
        ("module", "0.gate"),
        ("product", "mul"),
        ("module", "0.attn"),
        ("product", "mul"),
        ("take", "1:2"),
        ("module", "0.norm"),
        ("difference", "sub"),
    ]
    assert [steps.index(of) for of in steps[6].of] == [3, 5]


def test_a_recorded_model_is_as_it_was():
    composition = compose_file("digits_softmax")
    with torch.device("meta"):
        model = composition.build(composition.model_cfg()).eval()
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    record(model, composition.info.sample(), {})
    with pytest.raises(RuntimeError):  # an image that does not fit, in the middle of a forward
        record(model, [torch.zeros(1, 5, 32, 32)], {})
    for path, module in model.named_modules():
        assert not module._forward_hooks and not module._forward_pre_hooks, path
        assert vars(module).keys() == before[path].keys(), path


# what is put there


def test_fusions_are_taken_apart_and_branches_numbered():
    lines = equations("nested")
    for line in (
        "attention(x) = a_1 + γ ⊙ Σ_{i>1} a_i",
        "a_1 = W_o [o of 3 heads]",
        "o = a_{1, 1} + γ ⊙ (M − a_{1, 1})",
        "M = Σ_i g_i a_{1, i}",
        "a_{1, 1} = softmax(q kᵀ / √d) v",
        "(a_{1, 2})_i = softmax(q_i k_{ρ(i)}ᵀ / √d) v_{ρ(i)}",
        "a_2 = x ⊙ σ(W₂ relu(W₁ mean(x)))",
    ):
        assert line in lines, line
    series = equations(
        {**vit("vit_tiny_patch16_224"), "attention": {"fuse": "serial", "of": ["softmax", "fourier"]}}
    )
    assert {"f_1(x) = W_o [o of 4 heads]", "f_2(x) = Re(FFT_n(FFT_c(x)))"} <= set(series)


def test_options_that_change_the_equation_are_named_and_sizes_are_numbers():
    put = {
        "fuse": "add",
        "of": [{"use": "top_k", "with": {"keep": 2}}, {"use": "soft", "with": {"variant": "gated"}}],
    }
    notes = [
        note
        for part in explain({**vit("vit_tiny_patch16_224"), "attention": put}).parts
        for note in part.notes
    ]
    assert "top_k: k = 2" in notes
    assert "soft: the equation is that of default options; here variant=gated" in notes


def test_deep_head_has_its_skip_its_heads_and_its_causal_decoder():
    found = explain("deep_head")
    notes = [note for part in found.parts for note in part.notes]
    assert "heads, layer by layer: 64, 32, 16, 8, 4, 2" in notes and "no token sees those after it" in notes
    assert "R_l = LN(M_l + R_{l−1}),  R_1 = M_1" in equations("deep_head")
    assert [part.title.split()[0] for part in found.parts][1::2] == [
        "encoder.0",
        "then",
        "attention:",
        "last",
    ]


def test_two_streams_and_a_class_token_keep_their_names():
    lines = equations("dual_class_cross")
    assert {"a ← a + cross_a(x, y)", "b ← b + cross_b(y, x)", "output = W_head [a_0; a_65]"} <= set(lines)


class Silent(Head):
    """Nothing that a card would say.

    Args:
        site: Where it is.
    """

    card = Card("silent", Family.DOT_PRODUCT, "It says no equation.", masks={"keys"})

    def attend(self, q, k, v, *, mask, layout):
        raise RuntimeError("nobody runs it")


def test_a_card_without_an_equation_says_so(monkeypatch):
    composition = compose_file("digits_softmax")
    site = composition.plans["blocks.0"]
    entry = replace(site.entry, name="silent", value=Silent)
    plans = {name: replace(site, entry=entry, card=Silent.card) for name in composition.plans}
    found = explain(replace(composition, plans=plans))
    assert "o = silent(q, k, v)" in [line for part in found.parts for line in part.equations]
    assert "the card of `silent` has no equation: It says no equation." in str(found)


# how it is shown


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.sample(25)
def test_every_recipe_is_explained_in_lines_that_fit_and_are_latex(recipe):
    found = explain(recipe)
    assert max(map(len, str(found).splitlines())) <= 80
    for part in found.parts:
        assert all(latex(equation) for equation in part.equations) and "\\text{?" not in part.latex
    assert found.latex().count("\\[") == sum(bool(part.equations) for part in found.parts)


def test_text_json_and_notebooks_say_the_same():
    found = attnzoo.explain("ham_b")
    text = str(found)
    assert "  x ← x + attention(LN(x))" in text.splitlines() and "[2] Vaswani" in text
    data = json.loads(json.dumps(found.as_dict(), ensure_ascii=False))
    assert [part["title"] for part in data["parts"]] == [part.title for part in found.parts]
    assert found.parts[0].latex in found._repr_markdown_() and "&lt;" not in found._repr_markdown_()
    assert "<pre>ham_b" in found._repr_html_()


def test_the_verb_prints_text_latex_and_json(capsys):
    from attnzoo.cli.app import app

    def printed(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            app(["explain", "digits_softmax", *arguments])
        assert not end.value.code
        return capsys.readouterr().out

    assert "x ← x + attention(LN(x))" in printed() and "next: attnzoo" in printed()
    assert "x ← x + γ_1 ⊙ attention(LN(x))" in printed("--set", "host.model.init_values=0.5")
    assert "\\[\n\\begin{split} x &\\leftarrow x + " in printed("--latex")
    assert json.loads(printed("--json"))["name"] == "digits_softmax"


def test_what_a_plugin_wrote_that_cannot_be_read_is_shown_as_it_is():
    part = Part("silent", ("x = q kᵀ", "x = {q & \\k"))
    assert part.latex == r"\begin{split} & x = q k^{\top} \\ & \text{x = ?q ? ?k} \end{split}"

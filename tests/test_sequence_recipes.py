"""Recipes of sequence models: every fault at its line and column, and who may be put where.

A `⟦` in a text marks where a fault is expected, as in test_recipe_errors.py.
"""

from functools import cache

import pytest
import torch
from test_recipe_errors import agree, faults_of, marked
from test_seq2seq import future_leaks, ids, neighbours_matter, padded, pads_matter
from typer.testing import CliRunner

import attnzoo
from attnzoo import hookimpl
from attnzoo.cli.app import app
from attnzoo.core import Fusion, FusionCard, Law, Pool
from attnzoo.errors import RecipeError
from attnzoo.hosts import seq2seq
from attnzoo.hosts.sequence import SequenceModel
from attnzoo.recipe import compose, compose_file, load, resolve
from attnzoo.zoo import Zoo, load_zoo

R, A = "recipe: 1\n", "attention: softmax\n"


def pair(host: str = "", rest: str = A) -> str:
    """A recipe of an encoder and decoder, with these keys of the host."""
    return f"{R}host: {{kind: seq2seq{host and ', '}{host}}}\n{rest}"


def line(host: str = "", rest: str = A) -> str:
    """A recipe of a stack of layers, with these keys of the host."""
    return f"{R}host: {{kind: sequence{host and ', '}{host}}}\n{rest}"


def vit(rest: str) -> str:
    """A recipe of a backbone of two blocks of width 192."""
    return f"{R}host: {{kind: vit, base: vit_tiny_patch16_224, model: {{depth: 2}}}}\n{A}{rest}"


def heads(text: str) -> str:
    """An encoder and decoder of six layers each with these heads."""
    return pair("", f"{A}heads: {text}\n")


def skip(text: str) -> str:
    """An encoder and decoder with this skip."""
    return pair("", f"{A}skip: {text}\n")


SAID = {
    "misspelt_dim": (pair("⟦dimm: 4"), "AZ110 did you mean `dim`?"),
    "misspelt_kind": (f"{R}host: {{kind: ⟦sequnce}}\n{A}", "AZ113 did you mean `sequence`?"),
    "kinds_are_named": (f"{R}host: {{kind: ⟦rnn}}\n{A}", "AZ113 `vit`, `cct`, `pyramid`, `dual`, `seq2seq` or `sequence`"),
    "key_of_a_stack": (pair("⟦causal: true"), "AZ110 unknown key `causal` in `host`"),
    "key_of_a_pair": (line("⟦tie: all"), "AZ110 unknown key `tie` in `host`"),
    "norm_of_a_pair": (line("⟦norm: scalar"), "AZ110 unknown key `norm`"),
    "heads_in_host": (pair("⟦heads: 8"), "AZ110 `heads` stands at the top of the recipe"),
    "skip_in_host": (pair("⟦skip: merged"), "AZ110 `skip` stands at the top of the recipe"),
    "dim_zero": (pair("dim: ⟦0"), "AZ113 from 1 to 65536; this is 0"),
    "dim_text": (pair("dim: ⟦wide"), "AZ112 this is the text `wide`"),
    "layers_misspelt": (pair("layers: {encoder: 2, ⟦decodr: 3}"), "AZ110 did you mean `decoder`?"),
    "layers_none": (pair("layers: {encoder: ⟦0}"), "AZ113 `host.layers.encoder` must be a whole number from 1 to 256"),
    "layers_list": (pair("layers: ⟦[2, 3]"), "AZ112 this is [2, 3]"),
    "layers_by_side_in_a_stack": (line("layers: ⟦{encoder: 2}"), "AZ112 a mapping with `encoder`"),
    "vocab_of_special_ids_only": (pair("vocab: ⟦3"), "AZ113 from 4 to 10000000; this is 3"),
    "vocab_text": (pair("vocab: {source: 10, target: ⟦x}"), "AZ112 `host.vocab.target`"),
    "vocab_misspelt": (pair("vocab: {⟦sorce: 10}"), "AZ110 did you mean `source`?"),
    "length_one": (pair("max_length: ⟦1"), "AZ113 from 2 to 1000000"),
    "positions_misspelt": (pair("positions: ⟦rotery"), "AZ113 did you mean `rotary`?"),
    "tie_unknown": (pair("tie: ⟦both"), "AZ113 must be `none`, `target` or `all`"),
    "norm_misspelt": (pair("norm: ⟦layr"), "AZ113 did you mean `layer`?"),
    "norm_first_yes": (pair("norm_first: ⟦yes"), "AZ112 `yes` is text here: write true"),
    "dropout_one": (pair("dropout: ⟦1"), "AZ113 from 0 to below 1"),
    "act_misspelt": (line("act: ⟦reluu"), "AZ113 did you mean `relu`?"),
    "bias_number": (pair("bias: ⟦1"), "AZ112 must be `true` or `false`"),
    "mlp_negative": (pair("mlp_dim: ⟦-1"), "AZ113 from 0 to 1000000; this is -1"),
    "causal_text": (line("causal: ⟦maybe"), "AZ112 this is the text `maybe`"),
    "outputs_none": (line("outputs: ⟦0"), "AZ113 this is 0"),
    "nothing_comes_in": (f"{R}host: ⟦{{kind: sequence, vocab: 0}}\n{A}", "AZ113 either tokens come in (`vocab`) or vectors"),
    "both_come_in": (f"{R}host: ⟦{{kind: sequence, width: 3}}\n{A}", "AZ113 the other is 0"),
    "sites_of_another_host": (pair("", f"{A}overrides: [{{at: ⟦'blocks.*', put: softmax}}]\n"), "AZ304 encoder.0 to decoder.5.cross"),
    "sites_of_a_stack": (line("", f"{A}overrides: [{{at: ⟦encoder.0, put: softmax}}]\n"), "AZ304 the sites are layers.0, layers.1"),
    "tied_vocabularies_differ": (pair("vocab: {source: 10, target: 20}, tie: ⟦all"), "AZ309 the source has 10 ids, the target 20"),
    "own_heads_under_rotary": (
        pair("dim: 16, positions: rotary", "attention: {use: ⟦softmax, heads: 16}\nheads: 4\n"), "AZ316 pairs of channels",
    ),
    "heads_that_fit_beside_another_fault": (pair("dim: 12", f"{A}heads: 4\n⟦colour: red\n"), "AZ110 unknown key `colour`"),
    "key_of_a_vit": (pair("⟦embed_dim: 4"), "AZ110 unknown key `embed_dim`"),
}  # fmt: skip
HEADS = {
    "zero": (heads("⟦0"), "AZ113 from 1 to 1024; this is 0"),
    "text": (heads("⟦many"), "AZ112 this is the text `many`"),
    "fraction": (heads("⟦2.5"), "AZ112 this is 2.5"),
    "empty_list": (heads("⟦[]"), "AZ113 a list of 1 to 256 entries"),
    "text_in_list": (heads("[8, ⟦x, 8]"), "AZ112 `heads.1`"),
    "misspelt_side": (heads("{⟦encodr: 8}"), "AZ110 did you mean `encoder`?"),
    "no_first": (pair("", f"{A}⟦heads: {{schedule: halving}}\n"), "AZ111 `first` is missing in `heads`"),
    "no_schedule": (pair("", f"{A}⟦heads: {{first: 8}}\n"), "AZ111 `schedule` is missing in `heads`"),
    "no_such_schedule": (heads("{schedule: ⟦doubling, first: 2}"), "AZ113 `constant` or `halving`"),
    "key_of_a_schedule": (heads("{schedule: halving, first: 8, ⟦step: 3}"), "AZ110 `schedule`, `first`, `last`"),
    "list_too_short": (heads("⟦[8, 8]"), "AZ313 2 head counts were given for 6 layers"),
    "list_too_long": (pair("layers: 2", f"{A}heads: ⟦[8, 4, 2]\n"), "AZ313 3 head counts were given for 2 layers"),
    "list_of_a_side": (heads("{encoder: ⟦[8, 8]}"), "AZ313 2 head counts were given for 6 layers"),
    "list_of_the_other_side": (
        pair("layers: {encoder: 2, decoder: 3}", f"{A}heads: {{encoder: [8, 8], decoder: ⟦[8, 8]}}\n"), "AZ313 for 3 layers",
    ),
    "one_list_for_sides_that_differ": (pair("layers: {encoder: 2, decoder: 3}", f"{A}heads: ⟦[8, 8]\n"), "AZ313 for 3 layers"),
    "halving_runs_out": (heads("⟦{schedule: halving, first: 8}"), "AZ313 half of 1 is no number of heads for layer 5 of 6"),
    "halving_odd": (heads("{encoder: ⟦{schedule: halving, first: 6}}"), "AZ313 half of 3 is no number of heads for layer 3 of 6"),
    "halving_misses_last": (pair("layers: 3", f"{A}heads: ⟦{{schedule: halving, first: 8, last: 1}}\n"), "AZ313 end with 2, not with 1"),
    "constant_with_another_last": (heads("⟦{schedule: constant, first: 8, last: 4}"), "AZ313 cannot begin with 8 heads and end with 4"),
    "sides_of_a_stack": (line("", f"{A}heads: ⟦{{encoder: 2}}\n"), "AZ313 has no `encoder` and `decoder`"),
    "sides_of_a_vit": (vit("heads: ⟦{encoder: 3}\n"), "AZ313 belongs to a host of kind seq2seq"),
    "list_of_a_vit": (vit("heads: ⟦[3]\n"), "AZ313 1 head counts were given for 2 layers"),
    "halving_of_a_vit": (vit("heads: ⟦{schedule: halving, first: 3}\n"), "AZ313 half of 3 is no number of heads for layer 2 of 2"),
    "do_not_divide": (heads("⟦7"), "AZ308 7 heads do not divide a width of 512"),
    "do_not_divide_in_a_list": (heads("{encoder: ⟦[8, 8, 8, 8, 8, 7]}"), "AZ308 7 heads do not divide a width of 512"),
    "do_not_divide_on_a_side": (heads("{decoder: ⟦7}"), "AZ308 7 heads do not divide a width of 512"),
    "do_not_divide_a_vit": (vit("heads: ⟦5\n"), "AZ308 5 heads do not divide a width of 192"),
    "default_does_not_divide": (f"{R}⟦host: {{kind: seq2seq, dim: 100}}\n{A}", "AZ308 8 heads do not divide a width of 100"),
    "default_of_a_side_does_not_divide": (
        pair("dim: 12", f"{A}heads: ⟦{{encoder: 4}}\n"), "AZ308 8 heads do not divide a width of 12",
    ),
    "rotary_odd": (f"{R}⟦host: {{kind: seq2seq, positions: rotary, dim: 24}}\n{A}", "AZ316 8 heads of a width of 24 have 3 each"),
    "rotary_odd_heads": (pair("positions: rotary", f"{A}heads: ⟦512\n"), "AZ316 turn pairs of channels"),
    "rotary_odd_in_a_list": (
        line("positions: rotary", f"{A}heads: ⟦[4, 64]\n"), "AZ316 64 heads of a width of 64 have 1 each",
    ),
}  # fmt: skip
SKIPS = {
    "misspelt": (skip("⟦mergd"), "AZ113 did you mean `merged`?"),
    "misspelt_use": (skip("{⟦us: merged}"), "AZ110 did you mean `use`?"),
    "misspelt_at": (skip("{use: merged, ⟦att: x}"), "AZ110 did you mean `at`?"),
    "at_number": (skip("{use: merged, at: ⟦3}"), 'AZ112 write it in quotes: "3"'),
    "one_encoder": (skip("{use: encoder_stack, encoders: ⟦1}"), "AZ113 from 2 to 64; this is 1"),
    "number": (skip("⟦3"), "AZ112 this is 3"),
    "list": (skip("⟦[merged]"), 'AZ112 this is ["merged"]'),
    "no_use": (pair("", f"{A}⟦skip: {{at: x}}\n"), "AZ111 `use` is missing in `skip`"),
    "misspelt_key": (pair("", f"{A}⟦skipp: merged\n"), "AZ110 did you mean `skip`?"),
    "two_faults": (
        pair("", f"{A}heads: 4\nskip: {{use: merged, at: ⟦x.*}}\noverrides: [{{at: ⟦y, put: softmax}}]\n"), "AZ304 `x.*`", "AZ304 `y`",
    ),
    "demand_and_skip": (
        pair("", "attention: ⟦fourier\nskip: {use: cross, at: ⟦'encoder.*'}\n"), "AZ302 claims masks: none", "AZ302 claims masks: none",
        "AZ302 reads from a context", "AZ314 goes between sites decoder.*.cross",
    ),
}  # fmt: skip
GROUPS = {"host": SAID, "heads": HEADS, "skip": SKIPS}
TEXTS = [
    pytest.param(text, expected, id=f"{group}-{name}")
    for group, cases in GROUPS.items()
    for name, (text, *expected) in cases.items()
]


@pytest.fixture(scope="module", autouse=True)
def warm():
    """torch, timm and the zoo are loaded before anything is timed."""
    compose_file("transformer")


@pytest.mark.parametrize(("text", "expected"), TEXTS)
def test_bad_text(text, expected):
    clean, spots = marked(text)
    faults = faults_of(clean)
    if len(spots) < len(expected):  # several faults at one place, in any order
        assert {(f.place.line, f.place.column) for f in faults} == set(spots)
        said = [f"{f.code} {f.message} | {f.why} | {f.help}" for f in faults]
        assert len(said) == len(expected)
        for want in expected:
            code, _, words = want.partition(" ")
            assert any(one.startswith(code) and words in one for one in said), said
    else:
        agree(sorted(faults, key=lambda f: (f.place.line, f.place.column)), spots, expected)


def test_there_are_many_cases():
    assert len(TEXTS) >= 70


def test_the_command_line_ends_with_2_and_without_a_traceback(tmp_path):
    file = tmp_path / "bad.yaml"
    for case in TEXTS:
        text, expected = case.values
        clean, spots = marked(text)
        file.write_text(clean)
        result = CliRunner().invoke(app, ["compose", str(file)], env={"COLUMNS": "200"})
        assert result.exit_code == 2 and "Traceback" not in result.output, (case.id, result.output)
        assert all(f"error[{want[:5]}]" in result.output for want in expected), case.id
        assert all(f"bad.yaml:{row}:{column}" in result.output for row, column in spots), case.id


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"num_classes": 3}, "takes no argument `num_classes`"), ({"vocab": "x"}, "`vocab`: 'x'"), ({"dim": 0}, "`dim`: 0"),
     ({"pretrained": True}, "no published weights")],
)  # fmt: skip
def test_bad_arguments(arguments, words):
    with pytest.raises(RecipeError) as caught:
        compose(pair("dim: 16, max_length: 8"), **arguments)
    assert caught.value.code == ("AZ306" if "pretrained" in arguments else "AZ309") and words in str(
        caught.value
    )


def test_arguments_change_a_model_of_sequences():
    small = pair("dim: 16, mlp_dim: 8, layers: 1, max_length: 8, tie: target")
    assert compose(small, vocab={"source": 9, "target": 7}).head.out_features == 7
    assert compose(small, vocab=9, dim=32).embed_source.weight.shape == (9, 32)
    vectors = compose(line("dim: 16"), vocab=0, width=3, outputs=2)
    assert vectors(torch.randn(2, 5, 3)).shape == (2, 5, 2)


@pytest.mark.parametrize("option", [["--image", "x.png"], ["--out", "folder"], ["--init-from", "x.pth"]])
def test_compose_options_of_backbones_are_refused(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(pair("dim: 16, max_length: 8"))
    result = CliRunner().invoke(app, ["compose", "small.yaml", *option])
    assert result.exit_code == 2 and "error[AZ611]" in result.output and option[0] in result.output
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    "recipe",
    [pair("dim: 16, mlp_dim: 8, max_length: 8"), line("dim: 16"), line("dim: 16, vocab: 0, width: 3")],
)
@pytest.mark.sample(3)
def test_compose_shows_a_model_of_sequences(recipe, tmp_path):
    (tmp_path / "small.yaml").write_text(recipe)
    result = CliRunner().invoke(app, ["compose", str(tmp_path / "small.yaml")], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "received a finite one" in result.output, result.output
    as_data = CliRunner().invoke(app, ["compose", str(tmp_path / "small.yaml"), "--json"])
    assert as_data.exit_code == 0 and '"heads"' in as_data.output


# ------------------------------------------------------------------------------------------------------ who goes where

TINY = "dim: 16, mlp_dim: 24, layers: 2, vocab: 13, max_length: 12"
SITES = {
    "encoder": (pair, f"{TINY}, dropout: 0", "encoder.*"),
    "self": (pair, f"{TINY}, dropout: 0", "decoder.*.self"),
    "cross": (pair, f"{TINY}, dropout: 0", "decoder.*.cross"),
    "causal": (line, f"{TINY}, outputs: 5", "layers.*"),
    "free": (line, f"{TINY}, outputs: 5, causal: false", "layers.*"),
    "rotary": (pair, f"{TINY}, dropout: 0, positions: rotary", "encoder.*"),
    "rotary_self": (pair, f"{TINY}, dropout: 0, positions: rotary", "decoder.*.self"),
    "rotary_cross": (pair, f"{TINY}, dropout: 0, positions: rotary", "decoder.*.cross"),
}
"""A name for each kind of site: the kind of recipe, its host, and where."""
SCORERS = {"additive", "elu_linear", "grouped_query", "luong_global", "luong_local", "softmax"}
CAN = {
    "encoder": SCORERS | {"soft", "squeeze_excite"},
    "self": SCORERS,
    "cross": SCORERS | {"soft"},
    "causal": SCORERS | {"neighborhood"},
    "free": SCORERS | {"soft", "squeeze_excite", "neighborhood", "fourier"},
    "rotary": {"softmax", "elu_linear", "soft"},
    "rotary_self": {"softmax", "elu_linear"},
    "rotary_cross": SCORERS | {"soft"},
}
"""Who of the mechanisms known when this was written can go there with its defaults."""
KNOWN_NAMES = set().union(*CAN.values())
BUILT_IN = sorted(
    name
    for name, entry in load_zoo().mechanisms.items()
    if entry.plugin == "attnzoo" and not issubclass(entry.value, Pool)
)
OPTIONS = ["{use: soft, with: {variant: bahdanau}}", "{use: luong_global, with: {score: location}}",
           "{use: grouped_query, with: {groups: 2}}", "{fuse: add, of: [softmax, elu_linear]}",
           "{fuse: gated, level: tokens, of: [softmax, additive, luong_global]}",
           "{fuse: head_split, of: [softmax, elu_linear]}"]  # fmt: skip


def put(kind: str, spec: str) -> str:
    """A recipe with something at one kind of site, and softmax elsewhere."""
    recipe, host, at = SITES[kind]
    return recipe(host, f"{A}heads: 4\noverrides: [{{at: '{at}', put: {spec}}}]\n")


def composed(kind: str, spec: str):
    """The model in float64, in eval mode, or None when it is refused."""
    try:
        return compose(put(kind, spec)).double().eval()
    except RecipeError:
        return None


@cache
def admitted(kind: str) -> frozenset[str]:
    """The built-in mechanisms that can be put at one kind of site."""
    found = set()
    for name in BUILT_IN:
        try:
            compose_file(put(kind, name))
        except RecipeError:
            continue
        found.add(name)
    return frozenset(found)


def idle(name: str) -> bool:
    """Whether a parameter has nothing to do where `soft` pools a context: its one map does not look at queries."""
    return name.startswith("decoder") and (".cross.q." in name or ".around_cross.norm." in name)


def is_right(kind: str, spec: str, model) -> None:
    """Trains, and keeps to what a place in a host needs: padding, neighbours, the future, decoding step by step."""
    model.train()
    if isinstance(model, SequenceModel):
        x = torch.randint(0, 13, (3, 9))
        out = model(x)
        assert torch.equal(model.eval()(x[:, :]), out)
        if model.causal:
            changed = x.clone()
            changed[:, 5:] = (x[:, 5:] + 1) % 13
            assert torch.equal(model(changed)[:, :5], out[:, :5])
    else:
        out = model(*padded())
    out.square().mean().backward()
    for name, p in model.named_parameters():
        if "cross" in kind and spec == "soft" and idle(name):
            assert p.grad is None
        else:
            assert p.grad is not None and bool(p.grad.isfinite().all()), name
    if isinstance(model, SequenceModel):
        return
    model.eval()
    assert not pads_matter(model)
    assert not neighbours_matter(model)
    assert not future_leaks(model)
    source, target = padded()[0], ids(3, 7)
    state = model.start(model.encode(source))
    steps = torch.cat([model.step(part, state) for part in target.split([1, 1, 3, 2], dim=1)], dim=1)
    torch.testing.assert_close(steps, model(source, target), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.sample(4)
def test_who_can_go_there(kind):
    assert admitted(kind) & KNOWN_NAMES == CAN[kind]


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("kind", SITES)
@pytest.mark.sample(9)
def test_every_mechanism_is_right_or_refused_everywhere(kind, name):
    model = composed(kind, name)
    if model is not None:
        is_right(kind, name, model)
        return
    with pytest.raises(RecipeError) as caught:
        compose_file(put(kind, name))
    at = SITES[kind][2].replace("*", "0")
    for fault in caught.value.diagnostics:
        assert fault.code == "AZ302" and fault.message == f"`{name}` cannot be put at {at}"
        assert (fault.place.line, fault.place.column) == (
            5,
            put(kind, name).splitlines()[4].index(f"put: {name}") + 6,
        )
        assert any(words in fault.why for words in ("the site requires masks of kind", "reads from a context", "reads from a second stream", "rotary positions", "where the grid ends", "from the caller", "-D grid")), fault.why  # fmt: skip
        named = {one.strip("`") for one in fault.help.removeprefix("who can: ").split(", ")}
        ours = {one for one in named if one in BUILT_IN}
        assert ours & KNOWN_NAMES == CAN[kind]


@pytest.mark.parametrize("spec", OPTIONS)
@pytest.mark.parametrize("kind", SITES)
@pytest.mark.sample(3)
def test_options_and_fusions(kind, spec):
    model = composed(kind, spec)
    refused = "rotary" in kind and kind != "rotary_cross" and any(
        name in spec for name in ("luong_global", "grouped_query", "additive")
    )  # fmt: skip
    assert (model is None) is refused
    if model is not None:
        is_right(kind, spec, model)


FUSIONS = {name: entry.value.card for name, entry in load_zoo().fusions.items() if entry.plugin == "attnzoo"}
CAUSAL = sorted(name for name, card in FUSIONS.items() if "causal" in card.masks)


@pytest.mark.parametrize("level", ["heads", "tokens"])
@pytest.mark.parametrize("fusion", CAUSAL)
@pytest.mark.sample(3)
def test_fusions_hide_the_future(fusion, level):
    """A fusion that claims causal masks mixes no tokens, inside the heads and on tokens."""
    if level == "heads" and not FUSIONS[fusion].inside_heads:
        with pytest.raises(RecipeError, match=f"AZ303.*`{fusion}` cannot fuse inside the heads"):
            compose_file(put("self", f"{{fuse: {fusion}, level: heads, of: [softmax, elu_linear]}}"))
        return
    for kind in ("self", "causal"):
        model = composed(kind, f"{{fuse: {fusion}, level: {level}, of: [softmax, elu_linear]}}")
        assert model is not None
        if isinstance(model, SequenceModel):
            x = torch.randint(0, 13, (2, 9))
            changed = x.clone()
            changed[:, 5:] = (x[:, 5:] + 1) % 13
            assert torch.equal(model(changed)[:, :5], model(x)[:, :5])
        else:
            assert not future_leaks(model)


class Shift(Fusion):
    """Adds what the first branch gives the next token: it mixes tokens, and does not claim otherwise."""

    card = FusionCard(name="shift", summary="Σ, one branch moved by a token.", laws={Law.ADDITIVE})

    def merge(self, branches, x):
        return branches[0].roll(-1, dims=-2) + branches[-1]


class Plugin:
    """Offers `shift`."""

    @hookimpl
    def attnzoo_fusions(self):
        return [Shift]


@pytest.mark.parametrize("level", ["heads", "tokens"])
@pytest.mark.parametrize("fusion", sorted({*FUSIONS} - {*CAUSAL}))
def test_fusions_that_pool_see_no_padding(fusion, level):
    """A fusion that mixes tokens goes where padding is hidden, and is refused where later tokens or a context are."""
    spec = f"{{fuse: {fusion}, level: {level}, of: [softmax, elu_linear]}}"
    model = composed("encoder", spec)
    is_right("encoder", spec, model)
    for kind in ("self", "cross", "causal"):
        with pytest.raises(RecipeError, match=f"AZ302.*`{fusion}` cannot fuse at"):
            compose_file(put(kind, spec))


@pytest.mark.parametrize("kind,why", [("encoder", "padding is hidden"), ("self", "later tokens are hidden"), ("cross", "padding is hidden"), ("causal", "later tokens are hidden"), ("free", "")])  # fmt: skip
def test_a_fusion_that_mixes_tokens_is_refused_where_some_are_hidden(kind, why):
    zoo = Zoo.of([("mine", Plugin())])
    assert not zoo.problems
    loaded = load(
        put(kind, "{fuse: shift, of: [softmax, {fuse: shift, level: heads, of: [softmax, softmax]}]}")
    )
    if not why:
        resolve(loaded, zoo=zoo).build().double().eval()(padded()[0]).mean().backward()
        return
    with pytest.raises(RecipeError) as caught:
        resolve(loaded, zoo=zoo)
    assert len(caught.value.diagnostics) == 2  # the outer and the inner
    for fault in caught.value.diagnostics:
        assert fault.code == "AZ302" and "`shift` cannot fuse at" in fault.message
        assert fault.why == f"{why} there, and this fusion mixes tokens"
        can = [n for n, card in FUSIONS.items() if kind == "encoder" or "causal" in card.masks]
        assert fault.help == f"who can: {', '.join(f'`{name}`' for name in can)}"


def test_without_the_refusal_the_future_would_leak(monkeypatch):
    """The reason for the refusal: what it keeps out does look ahead."""
    monkeypatch.setattr(Shift, "card", FusionCard(name="shift", summary="Σ.", laws={Law.TOKEN_LOCAL}))
    loaded = load(put("self", "{fuse: shift, of: [softmax, elu_linear]}"))
    model = resolve(loaded, zoo=Zoo.of([("mine", Plugin())])).build().double().eval()
    assert future_leaks(model)


def test_windows_that_shift_at_the_end_would_see_the_padding(monkeypatch):
    """The reason for another refusal: `neighborhood` moves its last windows by where the padding ends."""
    honest = seq2seq.Requirements
    monkeypatch.setattr(seq2seq, "Requirements", lambda **said: honest(**said | {"open_end": ""}))
    model = composed("encoder", "{use: neighborhood, with: {window: 3}}")
    assert model is not None and pads_matter(model)


def test_the_zoo_is_open_to_models_of_sequences():
    assert isinstance(attnzoo.compose(line("dim: 16")), SequenceModel)

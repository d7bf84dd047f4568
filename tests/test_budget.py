"""Equal budgets: recipes that are made to cost what another does."""

import json

import pytest
import torch
from typer.testing import CliRunner

import attnzoo
from attnzoo.bench import budget
from attnzoo.bench.budget import cost, match, matched
from attnzoo.cli.app import app
from attnzoo.errors import RecipeError
from attnzoo.recipe import build, load

SEQ = "recipe: 1\nname: %s\nhost: {kind: sequence, dim: 16, layers: 2, vocab: 9, max_length: 12}\nattention: %s\n"
PYRAMID = (
    "recipe: 1\nhost: {kind: pyramid, model: {img_size: 32, dims: [16, 32], depths: [1, 1], num_heads: [2, 2], "
    "mlp_ratios: [2.0, 2.0]}}\nattention: %s\n"
)


def verb(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def counted(name: str, edits=()) -> int:
    return sum(p.numel() for p in build(load(name, edits)).parameters())


def test_what_is_counted_is_the_model():
    found = cost(load("digits_agent"))
    model = attnzoo.compose("digits_agent")
    assert found.params == sum(p.numel() for p in model.parameters()) and found.seconds is None
    assert found.flops == json.loads(verb("compose", "digits_agent", "--json"))["flops"]


@pytest.mark.parametrize("what", ["params", "flops"])
@pytest.mark.parametrize("name", ["digits_linformer", "digits_fourier", "digits_memory"])
@pytest.mark.sample(3)
def test_a_match_is_near(name, what):
    found = matched(["digits_softmax", name], what, load)[name]
    wanted = cost(load("digits_softmax")).of(what)
    assert abs(cost(load(name, found.edits)).of(what) / wanted - 1) <= 0.01
    assert found.edits and found.after.of(what) == cost(load(name, found.edits)).of(what) != found.before.of(
        what
    )


def test_the_nearest_whole_width_is_taken():
    """One channel more, or one less, is further away."""
    (edit,) = matched(["digits_softmax", "digits_fourier"], "params", load)["digits_fourier"].edits
    name, _, ratio = edit.partition("=")
    dim, wanted = 32, cost(load("digits_softmax")).params
    width = int(dim * float(ratio))
    miss = [
        abs(cost(load("digits_fourier", [f"{name}={(width + more + 1e-6) / dim}"])).params - wanted)
        for more in (-1, 0, 1)
    ]
    assert miss[1] == min(miss) and miss[1] < miss[0]


def test_models_of_sequences_and_in_stages():
    def sequences(name, edits):
        return load(SEQ % ("made", name), edits)

    edits = matched(["softmax", "{use: softmax, heads: 2}", "talking_heads"], "params", sequences)[
        "talking_heads"
    ].edits
    assert edits[0].startswith("host.mlp_dim=")
    found = matched(["softmax", "squeeze_excite"], "params", lambda name, edits: load(PYRAMID % name, edits))
    assert found["squeeze_excite"].edits[0].startswith("host.model.mlp_ratios=[")
    assert abs(found["squeeze_excite"].after.params / found["softmax"].after.params - 1) < 0.01


def test_time_is_measured(monkeypatch):
    """With a clock that says how wide the MLPs are."""
    monkeypatch.setattr(budget, "_seconds", lambda loaded: cost(loaded).flops / 1e9)
    found = matched(["digits_softmax", "digits_fourier"], "time", load)
    assert abs(found["digits_fourier"].after.seconds / found["digits_softmax"].after.seconds - 1) <= 0.05


def test_who_cannot_is_named():
    with pytest.raises(RecipeError) as caught:
        matched(["digits_softmax", "ham_b_tiny", "digits_fourier", "ham_b_small"], "params", load)
    assert [f.code for f in caught.value.diagnostics] == ["AZ325"] * 2
    assert all("without MLPs it has" in f.message for f in caught.value.diagnostics)
    with pytest.raises(RecipeError, match="16 times as wide"):
        matched(["ham_b_tiny", "digits_fourier"], "params", load)


def edited(name, edits):
    """A recipe whose edits follow its name."""
    name, *more = name.split()
    return load(name, [*more, *edits])


@pytest.mark.parametrize(
    "first,name,what",
    [
        ("digits_softmax", "digits_agent", "params"),
        ("digits_softmax host.model.embed_dim=96", "digits_fourier host.model.mlp_ratio=1", "flops"),
    ],
)
def test_tokens_may_be_made_wider_or_narrower(first, name, what):
    """The first cannot be matched by its MLPs at all."""
    found = matched([first, name], what, edited, by="width")[name]
    width, mlp = (edit.partition("=") for edit in found.edits)
    assert (width[0], mlp[0]) == ("host.model.embed_dim", "host.model.mlp_ratio") and int(width[2]) % 8 == 0
    after = cost(edited(name, found.edits))
    assert abs(after.of(what) / cost(edited(first, ())).of(what) - 1) <= 0.01 and after == found.after
    ratio = edited(name, ()).recipe.host.model.mlp_ratio or 4
    assert 0.5 < float(mlp[2]) / ratio < 2  # the nearest width leaves little to the MLPs


def test_widths_of_sequences_and_stages():
    def sequences(name, edits):
        return load(SEQ % ("made", "softmax"), [*name.split()[1:], *edits])

    found = matched(["a host.dim=32", "b"], "params", sequences, by="width")["b"]
    assert found.edits[0].startswith("host.dim=") and found.after.params > 1.5 * found.before.params

    def staged(dims, edits):
        return load((PYRAMID % "softmax").replace("[16, 32]", dims), edits)

    found = matched(["[16, 32]", "[32, 64]"], "params", staged, by="width")["[32, 64]"]
    assert found.edits[0] == "host.model.dims=[16, 32]" and found.after.params < found.before.params / 2


def test_who_cannot_by_width_either():
    with pytest.raises(RecipeError, match="AZ325.*channels"):
        matched(
            ["digits_fourier host.model.embed_dim=8", "digits_fourier host.model.num_classes=1000"],
            "params",
            edited,
            by="width",
        )


def test_no_mlps_nothing_to_change():
    text = PYRAMID.replace("mlp_ratios: [2.0, 2.0]", "mlp_ratios: [0, 0]")
    one = match(cost(load("digits_softmax")), "params", lambda edits: load(text % "softmax", edits))
    assert one.after is None and "no MLPs" in one.reason


def test_the_verbs(tmp_path):
    said = verb("cost", "digits_softmax", "digits_fourier")
    assert f"{counted('digits_fourier'):,}".replace(",", " ") in said.replace("\u00a0", " ")
    data = json.loads(verb("cost", "digits_softmax", "digits_fourier", "--match", "params", "--json"))
    edits = data["digits_fourier"]["edits"]
    assert counted("digits_fourier", edits) == data["digits_fourier"]["params"]
    small = ["train.epochs=1", "host.model.depth=1"]
    words = [word for edit in small for word in ("--set", edit)]
    out = json.loads(verb("compare", "digits_softmax", "digits_fourier", "--match", "params", "--seeds", "1", "--workers", "1",
                          "--out", str(tmp_path), *words, "--json"))  # fmt: skip
    sizes = {row["recipe"]: row["params"] for row in out["rows"]}
    assert (
        abs(sizes["digits_fourier"] / sizes["digits_softmax"] - 1) < 0.01 and out["matched"]["digits_fourier"]
    )
    assert "AZ325" in verb("cost", "digits_softmax", "ham_b_tiny", "--match", "params", code=2)


def test_nothing_is_allocated():
    before = torch.get_rng_state()
    cost(load("ham_b_base"))
    assert torch.equal(torch.get_rng_state(), before)

"""What a plugin does wrong once it is imported is its own fault: named, with a code, and nothing else is disturbed."""

import json
import math
import os
import shutil
import sys
import textwrap
from pathlib import Path

import processes
import pytest
import torch
from test_plugins import RECIPE, TIMM_RECIPE, WITH_RECIPE, assert_builtins, points, run, write_plugin
from typer.testing import CliRunner

from attnzoo import timm_hook
from attnzoo.cli.app import app
from attnzoo.core import Card, Family
from attnzoo.errors import PluginError, RecipeError
from attnzoo.recipe import load, resolve
from attnzoo.zoo import Zoo, manager

ROOT = Path(__file__).parent.parent
PLUGIN = """
    import os, sys
    import torch
    from torch import nn
    from attnzoo import hookimpl
    from attnzoo.core import Card, Family, Fusion, FusionCard, Head, Mechanism

    class Own(BaseException):
        pass

    class Inner(Head):
        card = Card(name="inner", family=Family.MIXING, summary="Gives back its values.")

        def __init__(self, site, *, scale: float = 1.0):
            super().__init__(site)
            {init}

        @classmethod
        def claims(cls, **options):
            {claims}
            return cls.card

        def init_weights(self):
            {init_weights}

        def no_weight_decay(self):
            {decay}
            return set()

        def attend(self, q, k, v, *, mask, layout):
            out = v * 1.0
            {attend}
            return out

    class Outer(Mechanism):
        card = Card(name="outer", family=Family.MIXING, summary="Gives back its tokens.")

        def __init__(self, site):
            super().__init__(site)
            self.weight = nn.Parameter(torch.ones(site.dim))

        def mix(self, x, source, *, mask, layout):
            out = x * self.weight
            {forward}
            return out

    class Merge(Fusion):
        card = FusionCard(name="merge", summary="The sum.")

        @classmethod
        def sites(cls, site, arity):
            {sites}
            return [site] * arity

        def merge(self, branches, x):
            out = sum(branches)
            {merge}
            return out

    class Good(Head):
        card = Card(name="good", family=Family.MIXING, summary="Gives back its values.")

        def __init__(self, site):
            super().__init__(site)

        def attend(self, q, k, v, *, mask, layout):
            return v

    @hookimpl
    def attnzoo_mechanisms():
        return [Inner, Outer, Good]

    @hookimpl
    def attnzoo_fusions():
        return [Merge]
"""
PLACES = ("init", "claims", "init_weights", "decay", "attend", "forward", "sites", "merge")
NAMES = {"forward": "outer", "sites": "merge", "merge": "merge"}


def source(**changes: str) -> str:
    """The plugin with statements at some of its places."""
    return PLUGIN.format(**dict.fromkeys(PLACES, "pass") | changes)


def recipe(where: str) -> str:
    """A small recipe that uses the component with this place."""
    name = NAMES.get(where, "inner")
    return RECIPE.replace(
        "use: NAME", "fuse: merge, of: [softmax, softmax]" if name == "merge" else f"use: {name}"
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder on `sys.path`; what is imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(manager, "SLOW", math.inf)  # on a busy machine any import may take a second
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("az_")]:
        del sys.modules[name]


def zoo_with(folder, text: str) -> Zoo:
    write_plugin(folder, "mine", text)
    return Zoo.of(points=points(folder))


@pytest.mark.parametrize(
    "statement", ["1 / 0", "sys.exit(5)", "raise Own", "(lambda f: f(f))(lambda f: f(f))"]
)
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.sample(3)
def test_what_a_component_raises_is_a_fault_of_its_plugin(folder, where, statement):
    condition = "if options.get('scale') == 2.0: " if where == "claims" else ""
    zoo = zoo_with(folder, source(**{where: condition + statement}))
    text = recipe(where)
    if where == "claims":
        text = text.replace("inner", "inner, with: {scale: 2.0}")
    assert [problem.code for problem in zoo.problems] == []
    with pytest.raises(RecipeError) as caught:
        resolve(load(text), zoo=zoo)
    (fault,) = caught.value.diagnostics
    assert fault.code == (
        "AZ013" if where in ("init_weights", "decay", "attend", "forward", "merge") else "AZ215"
    )
    assert f"`mine/{NAMES.get(where, 'inner')}`" in fault.message
    assert fault.place is not None and fault.place.line == 4
    assert "az_mine.py:" in fault.why
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("where", ["claims", "init", "attend"])
def test_an_interrupt_stays_the_users(folder, where):
    condition = "if options.get('scale') == 2.0: " if where == "claims" else ""
    zoo = zoo_with(folder, source(**{where: f"{condition}raise KeyboardInterrupt"}))
    with pytest.raises(KeyboardInterrupt):
        resolve(load(recipe(where).replace("inner", "inner, with: {scale: 2.0}")), zoo=zoo)


@pytest.mark.parametrize(
    ("where", "statement", "says"),
    [
        ("attend", "return None", "None where 2 × 3 × 197 × 64 float32"),
        ("attend", "return v[:, :, :1]", "2 × 3 × 1 × 64"),
        ("attend", "return v[:1]", "1 × 3 × 197 × 64"),
        ("attend", "return v.double()", "float64"),
        ("attend", "return [v]", "a list"),
        ("attend", "return v.shape", "a Size"),
        ("forward", "return x[:, :1]", "2 × 1 × 192"),
        ("forward", "return x.mean()", "one number"),
        ("forward", "return None if self.training else x", "None"),
        ("forward", "return out.half()", "float16"),
        ("forward", "return x.sum(dim=-1, keepdim=True)", "2 × 197 × 1"),
        ("merge", "return branches", "a list"),
        ("merge", "return out[..., :1]", "2 × 3 × 197 × 1"),
        ("decay", "return None", "None for `no_weight_decay`"),
        ("decay", "return {1}", "a set for `no_weight_decay`"),
        ("sites", "return None", "None for `sites`"),
        ("sites", "return [site]", "a list for `sites`"),
        ("claims", "if options.get('scale') == 2.0: return None", "claims None"),
        ("claims", "if options.get('scale') == 2.0: return 'card'", "claims a str"),
        ("claims", "if options.get('scale') == 2.0: return Outer.card", "`outer`"),
    ],
)  # fmt: skip
@pytest.mark.sample(3)
def test_what_a_component_gives_back_is_looked_at(folder, where, statement, says):
    zoo = zoo_with(folder, source(**{where: statement}))
    text = recipe(where).replace("inner", "inner, with: {scale: 2.0}")
    with pytest.raises(RecipeError) as caught:
        resolve(load(text), zoo=zoo)
    (fault,) = caught.value.diagnostics
    assert fault.code == ("AZ011" if where == "claims" else "AZ014")
    assert f"`mine/{NAMES.get(where, 'inner')}`" in fault.message and says in fault.message, fault.message


def test_a_class_that_builds_something_else_is_refused(folder):
    text = source().replace(
        "class Inner(Head):",
        "class Inner(Head):\n        def __new__(cls, *_, **__):\n            return None\n",
    )
    with pytest.raises(RecipeError, match="gives None when it is built") as caught:
        resolve(load(recipe("init")), zoo=zoo_with(folder, text))
    assert caught.value.code == "AZ014"


def test_a_branch_that_broadcasts_is_refused(folder):
    """A sum would hide it."""
    zoo = zoo_with(folder, source(forward="return x[:, :1]"))
    with pytest.raises(RecipeError, match="mine/outer"):
        resolve(load(RECIPE.replace("use: NAME", "fuse: add, of: [softmax, outer]")), zoo=zoo)


@pytest.mark.parametrize(
    "statement",
    [
        "out = out + float(v.abs().max()) * 0",
        "out = out if v.sum() > 0 else -out",
        "out = out + torch.from_numpy(v.detach().numpy()) * 0",
        "out = out[v.abs() >= 0].reshape(v.shape)",
        "out = out + torch.nonzero(v).shape[0] * 0",
    ],
)
def test_a_forward_that_looks_at_numbers_composes(folder, statement):
    zoo = zoo_with(folder, source(attend=statement))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    resolve(load(recipe("attend")), zoo=zoo)
    assert torch.equal(torch.get_rng_state(), before)
    wrong = zoo_with_other(folder, source(attend=f"{statement}; out = out[:, :, :1]"))
    with pytest.raises(RecipeError, match="AZ014"):
        resolve(load(recipe("attend")), zoo=wrong)


def zoo_with_other(folder, text: str) -> Zoo:
    """A second version of the plugin."""
    for name in [name for name in sys.modules if name.startswith("az_")]:
        del sys.modules[name]
    (folder / "az_mine.py").write_text(textwrap.dedent(text))
    os.utime(folder / "az_mine.py", (1, 1))
    return Zoo.of(points=points(folder))


def test_a_fault_in_the_backward_pass_is_found(folder):
    backward = """
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            raise ZeroDivisionError("backward")

    class Inner(Head):"""
    text = source(attend="out = Wrong.apply(v)").replace("    class Inner(Head):", backward)
    composition = resolve(load(recipe("attend")), zoo=zoo_with(folder, text))
    model = composition.build()
    with pytest.raises(PluginError, match="AZ013.*`mine/inner`.*backward"), composition.watching(model):
        model(torch.randn(1, 3, 224, 224)).sum().backward()


def test_a_fault_while_the_model_itself_is_built_names_the_plugin(folder):
    zoo = zoo_with(folder, source(init_weights="if not torch.empty(0).is_meta: sys.exit(5)"))
    composition = resolve(load(recipe("init")), zoo=zoo)
    with pytest.raises(PluginError) as caught:
        composition.build()
    assert caught.value.code == "AZ013" and "`mine/inner` failed with SystemExit: 5" in str(caught.value)


def test_a_fault_that_only_shows_with_numbers_is_named_by_the_run(folder):
    zoo = zoo_with(folder, source(attend="out = out if v.is_meta else out[:, :, :1]"))
    composition = resolve(load(recipe("attend")), zoo=zoo)
    model = composition.build()
    with pytest.raises(PluginError, match="AZ014"), composition.watching(model):
        model(torch.randn(1, 3, 224, 224))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_bug_of_a_builtin_keeps_its_traceback(monkeypatch):
    from attnzoo.mechanisms.dot_product.softmax import Softmax

    monkeypatch.setattr(Softmax, "__init__", lambda self, site, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        resolve(load(RECIPE.replace("NAME", "softmax")), zoo=Zoo.of())


# Verbs

SMALL = """
recipe: 1
host: {kind: vit, base: vit_tiny_patch16_224, model: {img_size: 8, patch_size: 4, embed_dim: 8, num_heads: 2, depth: 1, in_chans: 1, num_classes: 10}}
attention: inner
train: {data: digits, epochs: 1, batch_size: 256}
"""


@pytest.mark.parametrize(
    ("verb", "where", "statement", "says"),
    [
        ("train", "attend", "out = out if v.is_meta else sys.exit(5)", "failed with SystemExit: 5"),
        ("compose", "init_weights", "if not torch.empty(0).is_meta: raise Own", "failed with Own"),
    ],
)
def test_verbs_name_the_plugin(tmp_path, verb, where, statement, says):
    write_plugin(tmp_path, "mine", source(**{where: statement}))
    (tmp_path / "small.yaml").write_text(SMALL)
    out = ("--out", str(tmp_path / "run")) if verb == "train" else ()
    recipe = str(tmp_path / "small.yaml")
    done = run("-m", "attnzoo", verb, recipe, *out, "--json", path=tmp_path, code=3)
    (fault,) = json.loads(done.stdout)["errors"]
    assert fault["code"] == "AZ013" and f"`mine/inner` {says}" in fault["message"]
    assert fault["place"]["file"].endswith("az_mine.py") and "Traceback" not in done.stderr


def test_check_reports_what_a_component_raises(tmp_path):
    write_plugin(
        tmp_path, "mine", source(attend="raise Own", claims="if options.get('scale') == 2.0: sys.exit(5)")
    )
    done = run("-m", "attnzoo", "check", "mine/inner", "--examples", "1", "--json", path=tmp_path, code=1)
    results = json.loads(done.stdout)
    assert any("it raised Own" in result["reason"] for result in results)
    assert all(result["status"] in ("passed", "failed", "skipped") for result in results)


def test_check_reports_claims_that_raise():
    from attnzoo.core import Head
    from attnzoo.testing import check

    class Odd(Head):
        card = Card(name="odd", family=Family.MIXING, summary="Gives back its values.")

        @classmethod
        def claims(cls, **options):
            raise SystemExit(5)

        def attend(self, q, k, v, *, mask, layout):
            return v

    (result,) = check(Odd, examples=1)
    assert result.status == "failed" and "SystemExit" in result.reason


@pytest.mark.parametrize("text", ["x = 1", "raise SystemExit(3)", "CARDLESS"])
def test_check_of_a_file_that_cannot_be_checked_says_so(tmp_path, text):
    cardless = """
        from attnzoo.core import Head

        class Cardless(Head):
            def attend(self, q, k, v, *, mask, layout):
                return v
    """
    (tmp_path / "own.py").write_text(textwrap.dedent(cardless) if text == "CARDLESS" else text)
    result = CliRunner().invoke(app, ["check", str(tmp_path / "own.py")])
    assert result.exit_code == 2 and ("AZ502" in result.stderr or "AZ503" in result.stderr)


def test_timm_is_imported_whatever_goes_wrong_with_our_models(monkeypatch):
    monkeypatch.setattr(timm_hook, "_fill", lambda: 1 / 0)
    with pytest.warns(UserWarning, match="division by zero"):
        timm_hook._register()


# Cards


CARDS = {
    "unknown_family": ("object.__setattr__(Inner.card, 'family', 'nonsense')", "nonsense"),
    "no_summary": ("object.__setattr__(Inner.card, 'summary', None)", "summary"),
    "masks_are_none": ("object.__setattr__(Inner.card, 'masks', None)", "NoneType"),
    "unknown_mask": ("object.__setattr__(Inner.card, 'masks', {'nonsense'})", "nonsense"),
    "time_is_a_number": ("object.__setattr__(Inner.card, 'time', 3)", "int"),
    "deleted_field": ("object.__delattr__(Inner.card, 'family')", "family"),
    "mutable_masks": ("object.__setattr__(Inner.card, 'masks', ['keys'])", "no plain Card"),
    "subclass": (
        "late = []; masks = property(lambda self: sys.exit(5) if late else frozenset(), lambda self, value: None); "
        "C = type('C', (Card,), {'masks': masks}); "
        "Inner.card = C(name='inner', family=Family.MIXING, summary='x'); late.append(1)",
        "has a card that cannot be",
    ),
    "claims_none": ("Inner.claims = classmethod(lambda cls, **options: None)", "claims None"),
    "claims_another": ("Inner.claims = classmethod(lambda cls, **options: Outer.card)", "`outer`"),
    "claims_exit": ("Inner.claims = classmethod(lambda cls, **options: sys.exit(5))", "SystemExit: 5"),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_that_cannot_be_is_refused_and_nothing_else(folder, name):
    statement, says = CARDS[name]
    zoo = zoo_with(folder, source() + f"\n    {statement}\n")
    (problem,) = zoo.problems
    assert (
        problem.plugin == "mine" and problem.fatal and "`Inner`" in problem.reason and says in problem.reason
    )
    assert problem.code == ("AZ013" if name == "claims_exit" else "AZ011")
    assert next(provider.status for provider in zoo.providers if provider.name == "mine") == "in part"
    assert (
        {"good", "outer"} <= zoo.mechanisms.keys()
        and "merge" in zoo.fusions
        and "inner" not in zoo.mechanisms
    )
    assert_builtins(zoo)
    with pytest.raises(RecipeError) as caught:
        resolve(load(recipe("attend")), zoo=zoo)
    (fault,) = caught.value.diagnostics
    assert fault.code == "AZ205" and "`mine`" in fault.message and says in fault.why


CHANGES = [
    "object.__setattr__(Softmax.card, 'masks', frozenset())",
    "object.__setattr__(Softmax.card, 'family', 'nonsense')",
    "Softmax.card = None",
    "del Softmax.card",
    "Softmax.card = Inner.card",
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_card_of_somebody_else_is_put_back(folder, change):
    from attnzoo.mechanisms.dot_product.softmax import Softmax

    before = Softmax.card
    masks, family = before.masks, before.family
    late = "from attnzoo.mechanisms.dot_product.softmax import Softmax\n        " + change
    text = source().replace("return [Merge]", f"{late}\n        return [Merge]")
    try:
        zoo = zoo_with(folder, text)
        (problem,) = zoo.problems
        assert (problem.plugin, problem.code, problem.fatal) == ("mine", "AZ011", False)
        assert "attnzoo/softmax" in problem.reason
        assert (Softmax.card.masks, Softmax.card.family) == (masks, family)
        resolve(load(RECIPE.replace("NAME", "softmax")), zoo=zoo)
    finally:
        object.__setattr__(before, "masks", masks)
        object.__setattr__(before, "family", family)
        Softmax.card = before


def test_one_of_several_offers_that_fails_takes_no_other_with_it(folder):
    text = source().replace("return [Inner, Outer, Good]", "yield Outer; yield 3; yield Good; yield 1 / 0")
    text = text.replace("return [Merge]", "return [Merge, Merge]")
    zoo = zoo_with(folder, text)
    assert [problem.code for problem in zoo.problems] == ["AZ006", "AZ005", "AZ009"] or [
        problem.code for problem in zoo.problems
    ] == ["AZ005", "AZ006", "AZ009"]
    assert {"good", "outer"} <= zoo.mechanisms.keys() and "merge" not in zoo.fusions


def test_an_unknown_name_may_belong_to_a_plugin_that_could_not_be_loaded(folder):
    zoo = zoo_with(folder, "import no_such_module_anywhere")
    with pytest.raises(RecipeError, match="`mine`, which could not be loaded"):
        resolve(load(recipe("attend")), zoo=zoo)


# Names of timm's


TIMM = """
    import timm
    from timm.models import register_model
    {before}

    def build(pretrained=False, **options):
        raise SystemExit(5)

    for name in ("vit_base_patch16_224", "ham_vit_b", "my_own_model"):
        fn = lambda pretrained=False, **options: build()
        fn.__name__ = name
        register_model(fn)
"""


@pytest.mark.parametrize("first", ["import timm, attnzoo", "import attnzoo, timm", "import az_mine, attnzoo"])
def test_a_plugin_that_takes_names_of_timm_gives_them_back(tmp_path, first):
    write_plugin(tmp_path, "mine", TIMM.format(before=""))
    code = f"""
{first}
import timm
from attnzoo.zoo import load_zoo
print(*(f"{{p.plugin}} {{p.code}} {{p.fatal}} {{p.reason}}" for p in load_zoo().problems), sep="\\n")
for name in ("vit_base_patch16_224", "ham_vit_b"):
    timm.create_model(name, device="meta")
assert timm.models.get_pretrained_cfg("vit_base_patch16_224").hf_hub_id.startswith("timm/")
assert timm.is_model("my_own_model")
"""
    lines = run("-c", code, path=tmp_path).stdout.strip().splitlines()
    assert len(lines) == 2
    assert all(line.startswith("mine AZ015 False") for line in lines)
    assert "`vit_base_patch16_224`" in lines[0] and "`ham_vit_b`" in lines[1]


def test_a_recipe_of_a_plugin_cannot_take_a_name_of_ours_or_timms(tmp_path):
    write_plugin(tmp_path, "mine", WITH_RECIPE.format(first=""))
    (tmp_path / "recipes").mkdir()
    for name, model in {
        "a_first": "ham_vit_b",
        "a_second": "vit_base_patch16_224",
        "a_third": "mine_vit",
    }.items():
        (tmp_path / "recipes" / f"{name}.yaml").write_text(TIMM_RECIPE.replace("early_vit_tiny", model))
    code = """
import timm, attnzoo
from attnzoo.zoo import load_zoo
print(*(f"{p.plugin} {p.code} {p.reason}" for p in load_zoo().problems), sep=chr(10))
assert timm.create_model("ham_vit_b", device="meta").embed_dim != 192
assert timm.is_model("mine_vit")
"""
    lines = run("-c", code, path=tmp_path).stdout.strip().splitlines()
    assert len(lines) == 2 and all(line.startswith("mine AZ305") for line in lines), lines


# Files of built-ins


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of this checkout, to be broken."""
    folder = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "attnzoo", folder / "attnzoo", ignore=ignore)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    return folder


def attnzoo_at(folder, *arguments, code=0, python=()):
    """A verb, or with `python` some code, of another checkout."""
    command = python or ("-m", "attnzoo", *arguments)
    done = processes.run(
        *command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


BROKEN_FILES = {
    "mechanisms/mixing/fourier.py": ("\n\ndef broken(:\n", "SyntaxError"),
    "mechanisms/local/neighborhood.py": ("import no_such_module\n", "ModuleNotFoundError"),
    "mechanisms/channel/squeeze_excite.py": ("raise SystemExit(3)\n", "SystemExit: 3"),
    "fusions/gated.py": ("1 / 0\n", "ZeroDivisionError"),
    "fusions/max.py": ("\0", "null bytes"),
    "mechanisms/linear/__init__.py": ("class Nobody(BaseException): ...\nraise Nobody", "Nobody"),
}


@pytest.fixture(scope="module")
def broken_checkout(checkout):
    """A checkout in which six files are broken in six ways."""
    for name, (text, _) in BROKEN_FILES.items():
        path = checkout / "attnzoo" / name
        path.write_text(text if name.startswith("mechanisms/linear") else text + path.read_text())
    return checkout


def test_a_broken_file_of_ours_takes_only_its_own_with_it(broken_checkout):
    listing = json.loads(attnzoo_at(broken_checkout, "list", "--json").stdout)
    names = {kind: {row["name"] for row in listing[kind]} for kind in ("mechanisms", "fusions", "recipes")}
    here = Zoo.of()
    lost = {
        file.stem
        for path in map(Path, BROKEN_FILES)
        for file in ((ROOT / "attnzoo" / path.parent).glob("*.py") if path.stem == "__init__" else [path])
    }
    assert names["mechanisms"] == here.mechanisms.keys() - lost
    assert names["fusions"] == here.fusions.keys() - lost
    assert names["recipes"] == here.recipes.keys()
    assert "121 786" in attnzoo_at(broken_checkout, "compose", "ham_a").stdout


@pytest.mark.parametrize("verb", ["doctor", "plugins"])
def test_a_broken_file_of_ours_is_named(broken_checkout, verb):
    done = attnzoo_at(broken_checkout, verb, "--json", code=3 if verb == "doctor" else 0)
    data = json.loads(done.stdout)
    problems = [p["reason"] for p in data["problems"]] if verb == "doctor" else data[0]["problems"]
    for file, (text, says) in BROKEN_FILES.items():
        if says != "null bytes":  # of which Python names no line
            line = text.rstrip("\n").count("\n") + 1
            file = f"{file}:{line}"
        assert any(file in problem and says in problem for problem in problems), (file, problems)
    shown = " ".join(attnzoo_at(broken_checkout, verb, code=3 if verb == "doctor" else 0).stdout.split())
    assert "fourier.py:3" in shown and "SyntaxError" in shown and "in part" in shown


def test_a_recipe_that_needs_a_broken_file_is_told_so(broken_checkout):
    for name, key in (("fourier", "use"), ("attnzoo/fourier", "use"), ("gated", "fuse")):
        text = f"recipe: 1\nhost: {{kind: vit}}\nattention: {{{key}: {name}, of: [softmax, softmax]}}\n"
        (broken_checkout / "mine.yaml").write_text(
            text.replace(", of: [softmax, softmax]", "" if key == "use" else ", of: [softmax, softmax]")
        )
        done = attnzoo_at(broken_checkout, "compose", "mine.yaml", "--json", code=2)
        (fault,) = json.loads(done.stdout)["errors"]
        assert fault["code"] == "AZ205" and "could not be loaded" in fault["message"]
        assert f"{name.split('/')[-1]}.py:" in fault["why"] and "did you mean" not in fault["help"]
    for verb in ("show", "check"):
        assert "SyntaxError" in attnzoo_at(broken_checkout, verb, "fourier", code=2).stderr


def test_nobody_else_gets_the_name_of_a_broken_file(broken_checkout, tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_plugins import PART, write_plugin, points
import pathlib
folder = pathlib.Path({str(tmp_path)!r})
write_plugin(folder, "mine", PART.format(name="fourier"))
sys.path.insert(0, str(folder))
from attnzoo.zoo import Zoo
zoo = Zoo.of(points=points(folder))
print("fourier" in zoo.mechanisms, "mine/fourier" in zoo.mechanisms)
"""
    assert attnzoo_at(broken_checkout, python=("-c", code)).stdout.split() == ["False", "True"]

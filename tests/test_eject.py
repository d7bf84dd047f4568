"""Ejected files: the model's keys and bits without attnzoo, a plugin, einops, pydantic, jaxtyping or pluggy."""

import ast
import inspect
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from runpy import run_path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from attnzoo.cli.app import app
from attnzoo.core import Card, Family, Head
from attnzoo.ejecting import Ejected, eject
from attnzoo.ejecting.rewriting import decided, left_out, refitted, respelled, until_still
from attnzoo.errors import ZooError
from attnzoo.recipe import Composition, compose_file, load, resolve
from attnzoo.zoo import Zoo

ROOT = Path(__file__).parent.parent
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").rglob("*.yaml"))}
MOST = 1500
"""Lines of a file, at most."""
BANNED = ("attnzoo", "attnzoo_wavelets", "einops", "pydantic", "jaxtyping", "pluggy", "yaml", "typer")
SMALL = {"host.model.embed_dim": 32, "host.model.depth": 2}
SHORT = {"host.dim": 32, "host.mlp_dim": 64, "host.max_length": 24}
PAIR = {**SHORT, "host.layers": 2, "host.vocab": {"source": 40, "target": 50}}

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "plain": ("digits_softmax", {"host.model.attn_drop_rate": 0.1, "host.model.proj_drop_rate": 0.1}),
    "fused_heads": ("ham_b", SMALL),
    "fused_tokens": (
        "digits_gated_delta",
        {"attention": {"fuse": "gated", "of": ["gated_delta", "softmax"]}},
    ),
    "nested": ("digits_serial", {}),
    "own_heads": (
        "digits_softmax",
        {
            "attention": {
                "fuse": "add",
                "level": "tokens",
                "of": [{"use": "softmax", "heads": 2}, "separable"],
            }
        },
    ),
    "skip": ("digits_softmax", {"skip": "probs_pairmean"}),
    "pool": ("digits_map_pool", {}),
    "map": ("digits_region", {}),
    "rollout": ("digits_global_local_cross", {}),
    "any_size": ("digits_window", {"host.model.dynamic_img_size": True}),
    "dropped_patches": (
        "digits_softmax",
        {
            "host.model.patch_drop_rate": 0.25,
            "host.model.class_token": True,
            "host.model.global_pool": "token",
        },
    ),
    "undecayed": ("digits_relative_conv", {}),
    "cct": ("cct_conv_front", {**SMALL, "host.model.depth": 3}),
    "dual": ("dual_given", {}),
    "dual_pair": ("dual_pair", {}),
    "pyramid": ("pyramid_lit", {}),
    "sequence": ("induction", SHORT),
    "sequence_pool": ("induction", {**SHORT, "pool": "lama"}),
    "seq2seq": ("ham_seq2seq", PAIR),
    "seq2seq_skip": ("transformer", {**PAIR, "skip": "merged", "host.tie": "target"}),
}
"""A recipe and changes to it, for every way in which a model is built."""
TEXTS = {
    "eva": """
        recipe: 1
        name: eva
        host: {kind: vit, base: eva02_tiny_patch14_224, model: {depth: 2, img_size: 28, embed_dim: 32, num_heads: 4}}
        attention: {fuse: add, of: [softmax, soft]}
    """,
    "distilled": """
        recipe: 1
        name: distilled
        heads: [2, 4]
        host: {kind: vit, base: deit_tiny_distilled_patch16_224,
               model: {depth: 2, img_size: 32, patch_size: 8, embed_dim: 32, num_heads: 4}}
        attention: softmax
    """,
    "distilled_undecayed": """
        recipe: 1
        name: distilled_undecayed
        host: {kind: vit, base: deit_tiny_distilled_patch16_224,
               model: {depth: 2, img_size: 24, patch_size: 8, embed_dim: 16, num_heads: 4}}
        attention: {use: deformable, with: {stride: 2}}
    """,
    "empty_stages": """
        recipe: 1
        name: empty_stages
        host: {kind: pyramid, model: {img_size: 32, patch_size: 4, dims: [8, 16], depths: [1, 2], num_heads: [2, 4],
               mlp_ratios: [2.0, 2.0], stem: overlap, block: bottleneck, num_classes: 10}}
        attention: talking_heads
        overrides: [{at: "stages.*.*", put: null}]
        pool: slot
    """,
    "many_words": """
        recipe: 1
        name: many_words
        host: {kind: vit, base: vit_tiny_patch16_224, model: {depth: 1, img_size: 24, patch_size: 8, embed_dim: 16,
               num_heads: 4}}
        attention: {fuse: add, level: tokens, with: {start: identity}, of: [
          {use: gated_attention, with: {at: values}}, {use: retention, with: {expand: 3, turn: false}},
          {use: cascaded_group, with: {qk: 2, kernel: 1, start: one}}]}
    """,
}
PLUGIN = """
    recipe: 1
    name: waves
    host: {kind: vit, base: vit_tiny_patch16_224, model: {depth: 2, img_size: 32, patch_size: 8, embed_dim: 32,
           num_heads: 4}}
    attention: {fuse: wavelets/subband, of: [softmax, wavelets/haar]}
"""


def composed(case: str) -> Composition:
    if case == "plugin":
        return resolve(load(PLUGIN), zoo=with_plugin())
    if case in TEXTS:
        return compose_file(TEXTS[case])
    recipe, changes = CASES[case]
    return compose_file(RECIPES[recipe], [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def with_plugin() -> Zoo:
    """A zoo with the sample plugin, which need not be installed."""
    source = str(ROOT / "plugins" / "attnzoo-wavelets" / "src")
    if source not in sys.path:
        sys.path.append(source)
    import attnzoo_wavelets

    return Zoo.of(plugins=[("wavelets", attnzoo_wavelets)])


def inputs_of(composition: Composition, model: nn.Module, samples: int = 2) -> dict[str, torch.Tensor]:
    """What a model takes, drawn at random."""
    chance, info, kind = (
        torch.Generator().manual_seed(3),
        composition.info,
        composition.loaded.recipe.host.kind,
    )
    if kind == "seq2seq":
        source = torch.randint(3, info.form.source, (samples, 11), generator=chance)
        target = torch.randint(3, info.form.target, (samples, 7), generator=chance)
        source[1, 8:], target[0, 5:] = 0, 0  # padding
        return {"source": source, "target": target}
    if kind == "sequence":
        form = info.form
        shape = (samples, min(form.max_length, 17))
        if form.vocab:
            return {"x": torch.randint(0, form.vocab, shape, generator=chance)}
        return {"x": torch.randn(*shape, form.width, generator=chance)}
    inputs = {"x": torch.randn(samples, *info.image, generator=chance)}
    for name, given in composition.given.items():
        shape = (samples, *info.image[1:])
        labels = given == "labels"
        inputs[name] = (
            torch.randint(0, 4, shape, generator=chance) if labels else torch.rand(*shape, generator=chance)
        )
    for name, shape in getattr(model, "inputs", {}).items():
        inputs[name] = torch.randn(samples, *shape, generator=chance)
    return inputs


def answers(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs in eval mode, and after a step away from the start those of training, with all gradients."""
    found = {}
    with torch.no_grad():
        found["eval"] = model.eval()(**inputs)
        chance = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=chance))
    torch.manual_seed(5)
    found["train"] = model.train()(**inputs)
    found["train"].square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad
    found |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    return {name: tensor.detach() for name, tensor in found.items()}


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of what is not the same, bit for bit; of order, too."""
    if list(one) != list(other):
        return [f"names: {sorted(set(one) ^ set(other))}"]
    return [name for name in one if not torch.equal(one[name], other[name])]


def executed(text: str, name: str = "ejected") -> ModuleType:
    module = ModuleType(name)
    exec(compile(text, f"{name}.py", "exec"), vars(module))
    return module


def built(make) -> nn.Module:
    torch.manual_seed(0)
    return make()


def imported(text: str) -> set[str]:
    """Packages that a file imports, wherever."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def looks_well(text: str, formatted: bool = True) -> None:
    """Imports, length, and what ruff says."""
    strange = imported(text) - sys.stdlib_module_names
    assert strange <= {"torch", "timm", "torchvision", "safetensors", "numpy"}
    assert text.count("\n") <= MOST
    config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", "--stdin-filename", "ejected.py", "-"]
    for command in (["check"], ["format", "--check"]) if formatted else (["check"],):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *config],
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


BARE = """
import importlib.abc, importlib.util, json, sys, torch
from torch import nn

torch.set_num_threads(1)

{functions}

class Banned(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {banned}:
            raise ImportError(f"{{name}} is banned")

sys.meta_path.insert(0, Banned())
found = {{}}
for case in {cases}:
    spec = importlib.util.spec_from_file_location(case, f"{folder}/{{case}}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[case] = module
    spec.loader.exec_module(module)
    was = torch.load(f"{folder}/{{case}}.pt")
    torch.manual_seed(0)
    model = getattr(module, was["name"])()
    found[case] = differences(was["state"], model.state_dict()) + differences(was["answers"], answers(model, was["inputs"]))
print(json.dumps(found))
"""


DAILY = [
    "plain",
    "fused_heads",
    "pool",
    "map",
    "cct",
    "dual",
    "pyramid",
    "sequence",
    "seq2seq_skip",
    "plugin",
]
"""Cases for every day."""
GROUPS = {"daily": DAILY, "slow": [case for case in (*CASES, *TEXTS) if case not in DAILY]}
EVERY = [
    pytest.param(group, case, marks=pytest.mark.slow if group == "slow" else (), id=case)
    for group, cases in GROUPS.items()
    for case in cases
]


@cache
def made_of(case: str) -> tuple[Composition, Ejected]:
    composition = composed(case)
    return composition, eject(composition)


@cache
def in_bare_process(group: str, folder: Path) -> dict[str, list[str]]:
    """What differs between models and their files, in a process that can import neither the zoo nor a plugin."""
    cases = GROUPS[group]
    for case in cases:
        composition, made = made_of(case)
        (folder / f"{case}.py").write_text(made.text)
        model = built(composition.build)
        inputs = inputs_of(composition, model)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        was = {"name": made.name, "state": state, "inputs": inputs, "answers": answers(model, inputs)}
        torch.save(was, folder / f"{case}.pt")
    functions = "\n\n".join(map(inspect.getsource, (answers, differences)))
    code = BARE.format(banned=set(BANNED), cases=cases, folder=folder, functions=functions)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder,
        env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ejected")


@pytest.mark.parametrize(("group", "case"), EVERY)
def test_same_keys_and_bits_where_the_zoo_cannot_be_imported(group, case, folder):
    assert in_bare_process(group, folder)[case] == []


def test_a_banned_package_is_noticed():
    """The process of the test above runs no file that imports the zoo."""
    code = BARE.format(banned=set(BANNED), cases=[], folder="", functions="") + "\nimport attnzoo.errors"
    code = code.replace(", torch\nfrom torch import nn", "").replace("torch.set_num_threads(1)", "")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1 and "attnzoo is banned" in done.stderr


@pytest.mark.parametrize(("group", "case"), EVERY)
def test_the_file_is_short_and_as_ruff_has_it(group, case):
    looks_well(made_of(case)[1].text)


CHANGES = {
    "digits_softmax": ("k.mT", "k.mT * 1.0000001", False),  # what nobody watches is not run
    "digits_delta": ("+ 1e-6", "+ 2e-6", True),
    "digits_alibi": ("(-8", "(-8.001", True),
    "digits_gated_linear": ("CHUNK = 64", "CHUNK = 32", True),
    "digits_serial": ("outs.append(branch(self.fusion.feed(x_i, outs)", "outs.append(branch(x_i", True),
    "digits_softmax_one": ("x + self.drop_path1", "1.000001 * x + self.drop_path1", True),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("recipe", CHANGES)
def test_a_changed_constant_changes_bits(recipe):
    old, new, seen = CHANGES[recipe]
    composition = compose_file(RECIPES[recipe])
    made = eject(composition)
    text = made.text.replace(old, new)
    assert text != made.text
    inputs = inputs_of(composition, composition.build())
    before, after = (answers(built(executed(one).__dict__[made.name]), inputs) for one in (made.text, text))
    assert bool(differences(before, after)) == seen


def test_a_file_has_nothing_of_what_others_use():
    text = eject("digits_softmax").text
    for word in ("Fusion", "KVCache", "rearrange", "rotate", "Rotation", "Card", "jaxtyping", "AZ4", "fx."):
        assert word not in text, word


def test_steps_of_a_decoding_are_those_of_the_zoo():
    """With what is kept of the tokens before; the model of the file is all that a search asks."""
    composition, made = made_of("seq2seq_skip")
    model, other = built(composition.build).eval(), built(executed(made.text).__dict__[made.name]).eval()
    inputs = inputs_of(composition, model)
    with torch.no_grad():
        for one, length in ((model, 4), (other, 4)):
            state = one.start(one.encode(inputs["source"]))
            one.logits = torch.cat(
                [one.step(inputs["target"][:, i : i + 1], state) for i in range(length)], dim=1
            )
            state.select(torch.tensor([1, 0]))
        assert torch.equal(model.logits, other.logits)


def test_maps_of_attention_can_be_seen_in_a_file():
    """A hook on the window `weights` sees what the zoo's does."""
    composition = compose_file("digits_softmax")
    model = built(composition.build).eval()
    other = built(executed(eject(composition).text).digits_softmax).eval()
    images, seen = torch.randn(2, 3, 32, 32), []
    for one in (model, other):
        one.blocks[1].attn.inner.weights.register_forward_hook(lambda _module, _args, out: seen.append(out))
        one(images)
    assert torch.equal(*seen) and torch.allclose(seen[0].sum(dim=-1), torch.ones(2, 4, 64))


def test_arguments_can_be_others():
    model = executed(eject("digits_softmax").text).digits_softmax(num_classes=3, drop_path_rate=0.1)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    for name, value in (
        ("qk_norm", True),
        ("img_size", 64),
    ):  # decided: it would be ignored, or would not fit
        with pytest.raises(TypeError, match=name):
            executed(eject("digits_softmax").text).digits_softmax(**{name: value})


def test_what_an_optimiser_must_not_decay_is_the_same():
    for case in ("undecayed", "plain", "pool", "dual"):
        composition, made = made_of(case)
        model, other = composition.build(), executed(made.text).__dict__[made.name]()
        assert model.no_weight_decay() == other.no_weight_decay(), case


# -- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_written_with_its_weights(tmp_path):
    from attnzoo.train import train
    from attnzoo.train.settings import prepare

    loaded, settings = prepare("digits_softmax", ["train.epochs=1", "train.optimizer.lr=0.001"])
    run = train(loaded, settings, tmp_path / "run")
    written = eject(tmp_path / "run").save(tmp_path / "out" / "mine.py")
    assert [path.name for path in written] == ["mine.py", "mine.safetensors"]
    text = written[0].read_text()
    assert 'load_file("mine.safetensors")' in text
    looks_well(text)
    code = (
        "from safetensors.torch import load_file; import torch; from mine import digits_softmax as build\n"
        "model = build(); model.load_state_dict(load_file('mine.safetensors'))\n"
        "images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))\n"
        "torch.save(model.eval()(images).detach(), 'logits.pt')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path / "out")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.load(tmp_path / "out" / "logits.pt"), run.model()(images).detach())


def test_the_verb(tmp_path, capsys):
    out = tmp_path / "mine.py"
    done = CliRunner().invoke(app, ["eject", "digits_softmax", "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said == {"name": "digits_softmax", "lines": out.read_text().count("\n"), "written": [str(out)]}
    run_path(str(out), run_name="__main__")
    assert capsys.readouterr().out == "{'x': (2, 3, 32, 32)} -> (2, 10), 29,418 parameters\n"
    edits = ["--set", "attention=cosine", "--out", str(tmp_path / "other.py")]
    done = CliRunner().invoke(app, ["eject", "digits_softmax", *edits])
    assert done.exit_code == 0 and "next: python" in done.stdout
    assert "class Cosine" in (tmp_path / "other.py").read_text()


@pytest.mark.parametrize(
    ("source", "out", "code"),
    [
        ("digits_softmax", "there.py", "AZ970"),
        ("digits_softmax", "mine.txt", "AZ970"),
        ("digits_softmax", ".", "AZ970"),
        ("digits_softmax", "there.py/mine.py", "AZ970"),
        ("digits_sotfmax", "mine.py", "AZ204"),
        ("folder", "mine.py", "AZ801"),
    ],
)
def test_wrong_input_is_refused_and_nothing_is_lost(source, out, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.py").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ZooError) as caught:
        eject(source).save(out)
    assert caught.value.code == code
    assert (tmp_path / "there.py").read_text() == "mine"
    assert not (tmp_path / "mine.py").exists() and not (tmp_path / "mine.txt").exists()
    done = CliRunner().invoke(app, ["eject", source, "--out", out])
    assert done.exit_code == 2 and "Traceback" not in done.output


def test_weights_of_a_run_do_not_overwrite_either(tmp_path):
    made = Ejected("mine", "", {"w": torch.ones(1)})
    (tmp_path / "mine.safetensors").write_text("mine")
    with pytest.raises(ZooError, match="exists already"):
        made.save(tmp_path / "mine.py")
    assert not (tmp_path / "mine.py").exists()


# -- what cannot be taken ---------------------------------------------------------------------------------------------

COMPONENT = """
{imports}
from attnzoo.core import Card, Family, Head


class Mine(Head):
    card = Card(name="mine", family=Family.MIXING, summary="Gives back its values.", time="1", memory="1")

    def attend(self, q, k, v, *, mask, layout):
        return {out}
"""
MINE = "recipe: 1\nname: mine\nhost: {kind: vit, base: vit_tiny_patch16_224, model: {depth: 1}}\nattention: mine\n"


def zoo_of(cls: type) -> Zoo:
    from attnzoo import hookimpl

    return Zoo.of(plugins=[("mine", SimpleNamespace(attnzoo_mechanisms=hookimpl(lambda: [cls])))])


def plugin_file(folder: Path, name: str, text: str, monkeypatch) -> type:
    """The class `Mine` of a module that is written for a test."""
    import importlib

    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    return importlib.import_module(name).Mine


@pytest.mark.parametrize(
    ("imports", "out", "code", "word"),
    [
        ("", "v", None, ""),
        ("from PIL import Image", "v if Image else v", "AZ973", "PIL"),
        ("import torch\nif True:\n    SCALE = torch.ones(())", "v * SCALE", "AZ972", "SCALE"),
        ("SCALE = 1.0", 'v * globals()["SCALE"]', "AZ974", "SCALE"),
        ("import attnzoo", "v if attnzoo.NO_MASK.free else v", None, ""),
        ("import attnzoo", "v if attnzoo.core.NO_MASK.free else v", "AZ972", "attnzoo"),
    ],
)
def test_sources_of_plugins(imports, out, code, word, tmp_path, monkeypatch):
    name = f"plugin_{abs(hash((imports, out)))}"
    mine = plugin_file(tmp_path, name, COMPONENT.format(imports=imports, out=out), monkeypatch)
    composition = resolve(load(MINE), zoo=zoo_of(mine))
    if code is None:
        assert "class Mine(Head)" in eject(composition).text
        return
    with pytest.raises(ZooError, match=word) as caught:
        eject(composition)
    assert caught.value.code == code


def test_a_plugin_without_source_is_refused(tmp_path, monkeypatch):
    """Of a class that was made inside a function, and of one whose file is gone, nothing can be taken."""

    class Mine(Head):
        """Inside a function."""

        card = Card(name="mine", family=Family.MIXING, summary="Gives back its values.", time="1", memory="1")

        def attend(self, q, k, v, *, mask, layout):
            return v

    with pytest.raises(ZooError, match="not defined at the top") as caught:
        eject(resolve(load(MINE), zoo=zoo_of(Mine)))
    assert caught.value.code == "AZ972"
    gone = plugin_file(tmp_path, "plugin_gone", COMPONENT.format(imports="", out="v"), monkeypatch)
    (tmp_path / "plugin_gone.py").unlink()
    with pytest.raises(ZooError, match="is not there") as caught:
        eject(resolve(load(MINE), zoo=zoo_of(gone)))
    assert caught.value.code == "AZ972"


def test_two_components_of_one_name_stand_beside_each_other(tmp_path, monkeypatch):
    text = COMPONENT.format(imports="", out="F.softmax(v, dim=-1) * constant()").replace(
        "class Mine", "class Softmax"
    )
    text = (
        "from torch.nn import functional as F\n"
        + text
        + "\n\ndef constant():\n    return 0.5\n\n\nMine = Softmax\n"
    )
    mine = plugin_file(tmp_path, "plugin_softmax", text, monkeypatch)
    composition = resolve(
        load(MINE.replace("attention: mine", "attention: {fuse: add, of: [softmax, mine]}")), zoo=zoo_of(mine)
    )
    made = eject(composition)
    assert "class Softmax(Head)" in made.text and "class PluginSoftmaxSoftmax(Head)" in made.text
    model, other = built(composition.build), built(executed(made.text).mine)
    inputs = inputs_of(composition, model)
    assert differences(answers(model, inputs), answers(other, inputs)) == []


# -- rewriting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "known", "after"),
    [
        ("if a:\n    x = 1\nelse:\n    x = 2\ny = 3\n", {"a": True}, "x = 1\ny = 3\n"),
        ("if a:\n    x = 1\nelse:\n    # two\n    x = 2\ny = 3\n", {"a": False}, "# two\nx = 2\ny = 3\n"),
        (
            "if a:\n    x = 1\nelif b:\n    x = 2\nelse:\n    x = 3\n",
            {"a": False},
            "if b:\n    x = 2\nelse:\n    x = 3\n",
        ),
        (
            "if a:\n    x = 1\nelif b:\n    x = 2\nelse:\n    x = 3\n",
            {"b": False},
            "if a:\n    x = 1\nelse:\n    x = 3\n",
        ),
        (
            "if a:\n    x = 1\nelif b:\n    x = 2\nelse:\n    x = 3\n",
            {"b": True},
            "if a:\n    x = 1\nelse:\n    x = 2\n",
        ),
        ("x = f(1 if a else 2) + (b if not a else c)\n", {"a": False}, "x = f(2) + (b)\n"),
        ("x = a and b\n", {"a": False}, "x = False\n"),
        ("x = a and b\n", {"a": True}, "x = b\n"),
        ("x = a or b\n", {"a": False}, "x = b\n"),
        ("def f():\n    if a:\n        return 1\n    return 2\n", {"a": True}, "def f():\n    return 1\n"),
        ("def f():\n    if a:\n        g()\n", {"a": False}, "def f():\n    pass\n"),
        ("if isinstance(x, fx.Proxy):\n    y = 1\n", {}, "pass\n"),
    ],
)
def test_what_is_decided(before, known, after):
    assert until_still(before, decided(known)) == after


def test_what_is_said_otherwise():
    text = (
        "class A(Head):\n    # for the zoo\n    card = Card(\n        1\n    )\n\n    @classmethod\n    def claims(cls):\n"
        '        return 1\n\n    def f(self, x: Float[Tensor, "b n"]) -> None:\n'
        '        raise OptionError("AZ214", f"no {x}", help="none")\n'
    )
    plain = until_still(until_still(text, left_out), respelled)
    expected = (
        'class A(Head):\n\n\n    def f(self, x: Tensor) -> None:\n        raise ValueError(f"no {x}")\n'
    )
    assert plain == expected
    assert refitted("x = f(\n    1, 2\n)\n") == "x = f(1, 2)\n\n"
    kept = "x = f(\n    1,\n    2,\n)\n"
    assert refitted(kept).strip() == kept.strip()


# -- everything that ships --------------------------------------------------------------------------------------------

LARGE = 30_000_000
"""Numbers of a model whose gradients are compared for one image."""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "third_party"])
def test_every_recipe_ejects_at_its_own_size(recipe):
    composition = compose_file(RECIPES[recipe])
    made = eject(composition)
    looks_well(made.text)
    model, other = built(composition.build), built(executed(made.text).__dict__[made.name])
    assert differences(model.state_dict(), other.state_dict()) == []
    large = sum(parameter.numel() for parameter in model.parameters()) > LARGE
    pair = recipe.startswith("dual_pair") or composition.info.family == "transformer"
    inputs = inputs_of(composition, model, 2 if pair or not large else 1)
    assert differences(answers(model, inputs), answers(other, inputs)) == []


@pytest.mark.slow
def test_the_recipe_of_the_sample_plugin():
    composition = resolve(load(RECIPES["third_party"]), zoo=with_plugin())
    made = eject(composition)
    looks_well(made.text)
    assert "class Haar(Mechanism)" in made.text and "class Subband(Fusion)" in made.text
    model, other = built(composition.build), built(executed(made.text).__dict__[made.name])
    inputs = inputs_of(composition, model, 1)
    assert differences(answers(model, inputs), answers(other, inputs)) == []

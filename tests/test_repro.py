"""Runs and models that travel: what they were made with, what is missing, and a run that is trained again."""

import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import venv
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from test_cli import run as cli
from test_plugins import ROOT, SAMPLES, points
from test_plugins import run as python_run
from test_run_folder import rewrite
from training import RECIPE, images, last, settings, tiny

import attnzoo
from attnzoo.data.fingerprint import fingerprint
from attnzoo.data.folder import load_folder
from attnzoo.data.images import Images
from attnzoo.data.pairs import Pairs
from attnzoo.data.sequences.sequence_data import InMemory
from attnzoo.errors import RecipeError, RunError, VersionWarning
from attnzoo.recipe import load, resolve
from attnzoo.recipe.made_with import Plugin, made_with
from attnzoo.recipe.weights import save
from attnzoo.train import Stopped, checkpoint, open_run, train
from attnzoo.train.repro import repro
from attnzoo.zoo import Zoo, manager


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr("attnzoo.train.kinds.load_images", images)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with checkpoints at steps 8 and 12."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnzoo.train.kinds.load_images", images)
        folder = tmp_path_factory.mktemp("whole") / "run"
        tiny(folder)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def everything(folder):
    """Each file below a folder, with its bytes and the time it was written."""
    return {
        path: (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def rewritten(run, change):
    """The same change in the states of all checkpoints, vouched for."""

    def changed(state):
        change(state)
        return state

    for folder in run.glob("step_*"):
        rewrite(folder, changed)


# Training again


def test_a_run_comes_out_with_the_same_bits_and_is_only_read(run):
    before, threads = everything(run), torch.get_num_threads()
    found = attnzoo.repro(run)
    assert found.same and found.first is None and found.step == found.steps == 12 and not found.notes
    assert found.reached == "the same bits up to step 12 of 12"
    assert everything(run) == before and torch.get_num_threads() == threads
    assert not list(Path(tempfile.gettempdir()).glob("attnzoo-repro-*"))


def torch_of_old(state):
    state["environment"]["torch"] = state["record"]["environment"]["torch"] = "1.0"


def other_data(state):
    state["record"]["data"]["test"] = "0" * 64


def other_default(state):
    state["record"]["recipe"]["host"]["model"]["mlp_ratio"] = 3.0


def other_option(state):
    state["record"]["options"]["attnzoo/soft"][0]["variant"] = "gated"


def other_source(state):
    state["record"]["sources"]["attnzoo/soft"] = "0" * 64


def other_weights(state):
    state["record"]["weights"] = "0" * 64


def other_loss(state):
    state["record"]["losses"][2] += 1e-12


def other_row(state):
    for row in state["log"][1:2]:
        row["test_loss"] += 1e-12


def other_epoch(state):
    state["record"]["epochs"][:1] = ["0" * 64]


CHANGED = {
    torch_of_old: ("environment", "torch: 1.0 →", 12),
    other_data: ("data", "test side of `synthetic`: 000000000000… →", 0),
    other_default: ("recipe", "`host.model.mlp_ratio` of the recipe: 3.0 → none", 12),
    other_option: ("option", "option `variant` of `attnzoo/soft`: gated →", 12),
    other_source: ("source", "source of `attnzoo/soft`: 000000000000… →", 12),
    other_weights: ("weights", "initial weights: 000000000000… →", None),
    other_loss: ("training", "training loss of step 3:", 0),
    other_epoch: ("training", "weights after epoch 1: 000000000000… →", 0),
    other_row: ("training", "test loss of epoch 2:", 4),
}
"""What a record says otherwise: the difference that must be named, and up to where the bits are the same."""


@pytest.mark.parametrize("change", CHANGED, ids=lambda change: change.__name__)
@pytest.mark.sample(3)
def test_what_differs_is_named(change, run):
    about, says, step = CHANGED[change]
    rewritten(run, change)
    found = repro(run)
    assert not found.same and len(found.differences) == 1
    assert found.first.about == about and str(found.first).startswith(says), str(found)
    assert found.step == step


def test_weights_that_were_edited_and_vouched_for_anew(run):
    folder = run / "step_00000008"
    tensors = load_file(folder / "model.safetensors")
    tensors["head.bias"][0] += 1e-6
    save_file(tensors, folder / "model.safetensors")
    rewrite(folder, lambda state: state)
    found = repro(run)
    assert (
        found.first.about == "weights" and found.first.step == found.step == 8
    )  # as the record says; the file is another
    assert "`head.bias` of `model` after step 8" in found.first.what


def test_a_damaged_checkpoint_is_named_and_the_others_are_compared(run):
    file = run / "step_00000012" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found = repro(run)
    assert found.first.about == "checkpoint" and "model.safetensors changed" in str(found.first)
    assert found.step == found.steps == 8 and len(found.differences) == 1
    for other in run.glob("step_*/model.safetensors"):
        other.write_bytes(b"")
    with pytest.raises(RunError) as error:
        repro(run)
    assert error.value.code == "AZ805"


def test_one_pixel(run, monkeypatch):
    def others(*arguments, **named):
        data = images(*arguments, **named)
        data.train.images[7, 1, 2, 3] += 1
        return data

    monkeypatch.setattr("attnzoo.train.kinds.load_images", others)
    found = repro(run)
    assert [each.about for each in found.differences] == ["data"] and found.first.what.startswith(
        "train side"
    )
    assert found.step == 0


def test_a_component_that_computes_something_else(run, monkeypatch):
    from attnzoo.mechanisms.dot_product.softmax import Softmax

    attend = Softmax.attend
    monkeypatch.setattr(Softmax, "attend", lambda *a, **k: attend(*a, **k) * (1 + 1e-4))
    found = repro(run)
    assert found.first.about == "training" and found.first.step == 1 and found.step == 0, str(found)


def test_only_some_steps(run):
    assert repro(run, 0).step == 0
    found = repro(run, 6)
    assert found.same and (found.step, found.losses, found.steps) == (4, 6, 12)
    assert found.reached == "the same bits up to step 4 of 12, the same losses up to step 6"
    rewritten(run, other_row)
    assert not repro(run, 8).same
    with pytest.raises(RunError) as error:
        repro(run, -1)
    assert error.value.code == "AZ832"


def test_where_nothing_is_recorded_it_is_said(run):
    rewritten(run, lambda state: state["record"].update(losses=[]))
    found = repro(run, 6)
    assert (
        found.same and found.step == 4 and found.notes == ("between step 4 and step 6 nothing is recorded",)
    )


def test_a_run_of_an_attnzoo_that_wrote_no_record(run):
    rewritten(run, lambda state: state.pop("record"))
    found = repro(run)
    assert found.same and found.step == 12 and "no record" in found.notes[0]
    rewritten(run, lambda state: state["environment"].update(timm="0.9"))
    assert [each.what for each in repro(run).differences] == ["timm"]
    assert open_run(run).model() is not None


@pytest.mark.slow
def test_a_run_that_time_ended_and_one_that_went_on(tmp_path):
    tiny(tmp_path / "run", minutes=1e-9)
    found = repro(tmp_path / "run")
    assert found.same and found.step == found.steps == 2 and "part of an epoch" in found.notes[0]
    tiny(tmp_path / "run", ema=None)
    found = repro(tmp_path / "run")
    assert found.same and found.step == 12


@pytest.mark.slow
def test_a_run_with_averages_workers_and_a_checkpoint_in_the_middle(tmp_path):
    tiny(tmp_path / "run", ema=0.9, checkpoint_every=5, workers=2, keep=9)
    assert repro(tmp_path / "run").step == 12
    folder = tmp_path / "run" / "step_00000005"
    tensors = load_file(folder / "ema.safetensors")
    tensors["cls_token"] += 1
    save_file(tensors, folder / "ema.safetensors")
    rewrite(folder, lambda state: state)
    assert "`cls_token` of `ema` after step 5" in str(repro(tmp_path / "run").first)


def test_a_record_made_elsewhere(run):
    rewritten(run, lambda state: state["environment"].update(device="cuda"))
    rewritten(run, lambda state: state["record"]["environment"].update(device="cuda", threads=3))
    found = repro(run)
    assert [each.what for each in found.differences] == ["device", "threads"] and found.step == 0
    assert "another device" in found.notes[-1]


def test_as_many_threads_as_the_run_had(run, monkeypatch):
    def threads(state):
        state["environment"]["threads"] = state["record"]["environment"]["threads"] = 2

    rewritten(run, threads)
    seen = []
    assert repro(run, 0, report=seen.append).same  # the threads of here are those of the record meanwhile
    assert torch.get_num_threads() == 1


def test_ctrl_c_leaves_nothing(run):
    def interrupt(event):
        if event["event"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = everything(run)
    with pytest.raises(Stopped):
        repro(run, report=interrupt)
    assert everything(run) == before and not list(Path(tempfile.gettempdir()).glob("attnzoo-repro-*"))


def test_what_is_trained_can_be_kept(run, tmp_path):
    assert repro(run, out=tmp_path / "again").same
    assert open_run(tmp_path / "again").log()[-1]["test_loss"] == open_run(run).log()[-1]["test_loss"]
    for taken in (tmp_path / "again", last(run) / "state.json"):
        with pytest.raises(RunError) as error:
            repro(run, out=taken)
        assert error.value.code == "AZ832"


def test_the_command(run, monkeypatch):
    done = cli("repro", str(run))
    assert "the same bits up to step 12 of 12" in done.output and "next: attnzoo eval" in done.output
    rewritten(run, torch_of_old)
    data = json.loads(cli("repro", str(run), "--json", "--steps", "4", code=1).stdout)
    assert data["first"]["what"] == "torch" and data["first"]["recorded"] == "1.0" and data["step"] == 4
    assert "first difference: torch: 1.0 →" in cli("repro", str(run), "--steps", "0", code=1).output
    assert "AZ801" in cli("repro", str(run / "nothing"), code=2).output


# Plugins


PLUGIN = """
from attnzoo import hookimpl
from attnzoo.core import Card, Family, Head

class Halved(Head):
    card = Card(name="halved", family=Family.MIXING, summary="What it is.")

    def __init__(self, site, *, share: float = {share}):
        super().__init__(site)
        self.share = share

    def attend(self, q, k, v, *, mask, layout):
        return v * self.share

@hookimpl
def attnzoo_mechanisms():
    return [Halved]
"""
WITH_PLUGIN = RECIPE.replace("{fuse: add, of: [softmax, soft]}", "{fuse: add, of: [softmax, halved]}")


class Site:
    """A folder of packages, and what is installed there."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        monkeypatch.syspath_prepend(folder)

    def install(self, version="0.1", share="0.5", direct=None, dist="attnzoo-halves", source=PLUGIN):
        """Install the plugin in the place of the one that is there, as pip would."""
        self.remove()
        (self.folder / "az_halves.py").write_text(source.format(share=share))
        info = self.folder / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text("[attnzoo]\nhalves = az_halves\n")
        if direct:
            (info / "direct_url.json").write_text(json.dumps(direct))
        self.look()

    def remove(self):
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.look()

    def look(self):
        """A zoo of what is there now."""
        sys.modules.pop("az_halves", None)
        self.monkeypatch.setattr(sys, "dont_write_bytecode", True)
        self.monkeypatch.setattr(manager, "_zoo", Zoo.of(points=points(self.folder)))


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Packages on the path; they are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    yield Site(folder, monkeypatch)
    sys.modules.pop("az_halves", None)


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """A run with the plugin in version 0.1 from an index."""
    folder = tmp_path_factory.mktemp("halved")
    (folder / "site").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnzoo.train.kinds.load_images", images)
        Site(folder / "site", patch).install()
        train(WITH_PLUGIN, settings(epochs=1), folder / "run")
    sys.modules.pop("az_halves", None)
    return folder / "run"


@pytest.fixture
def plugged(halved, site, tmp_path):
    """A copy of it, where the plugin is there as it was."""
    site.install()
    return Path(shutil.copytree(halved, tmp_path / "plugged"))


def test_a_record_holds_the_plugins_of_its_recipe_alone(plugged, run):
    record = checkpoint.Checkpoint(last(plugged), 4).state()["record"]
    (plugin,) = record["made_with"]["plugins"].items()
    name, made = plugin
    assert name == "halves" and made["distribution"] == "attnzoo-halves" and made["version"] == "0.1"
    assert (
        made["origin"] == "index"
        and len(made["sha256"]) == 64
        and made["offers"] == {"mechanism": ["halved"]}
    )
    assert (
        record["options"]["halves/halved"] == [{"share": 0.5}]
        and record["environment"]["attnzoo-halves"] == "0.1"
    )
    assert checkpoint.Checkpoint(last(run), 12).state()["record"]["made_with"]["plugins"] == {}
    assert attnzoo.compose("ham_a", device="meta")._model_args["made_with"]["plugins"] == {}


@pytest.mark.parametrize(
    "there, about, says, step",
    [
        ({}, None, "", 4),
        ({"version": "0.2"}, "plugin", "plugin attnzoo-halves: 0.1 → 0.2", 4),
        ({"dist": "stranger-halves"}, "plugin", "plugin: attnzoo-halves 0.1 → stranger-halves 0.1", 4),
        ({"share": "0.50"}, "source", "source of the plugin attnzoo-halves 0.1:", 4),
        ({"version": "0.2", "share": "0.25"}, "plugin", "plugin attnzoo-halves: 0.1 → 0.2", 0),
    ],
    ids=["as it was", "version", "distribution", "source", "default"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::attnzoo.errors.VersionWarning")
@pytest.mark.sample(3)
def test_a_plugin_that_is_not_as_it_was(there, about, says, step, plugged, site):
    site.install(**there)
    found = repro(plugged)
    assert found.same == (about is None) and found.step == step, str(found)
    if about:
        assert found.first.about == about and str(found.first).startswith(says)
    if there.get("share") == "0.25":
        assert "option `share` of `halves/halved`: 0.5 → 0.25" in map(str, found.differences)
        assert found.differences[-1].about == "training" and "step 1" in found.differences[-1].what


def test_another_version_is_one_line_and_the_same_none(plugged, site, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_run(plugged).model()
    site.install(version="0.2")
    with pytest.warns(VersionWarning) as caught:
        open_run(plugged).model()
    text = "made with attnzoo-halves 0.1, here is attnzoo-halves 0.2 (plugin `halves`)"
    assert [str(one.message) for one in caught] == [text]
    done = cli("eval", str(plugged))
    assert done.stderr.splitlines() == [f"warning: {text}"] and "Warning" not in done.output
    with pytest.warns(VersionWarning):
        told = []
        tiny_again = open_run(plugged)
        train(tiny_again.loaded, tiny_again.settings, plugged, report=told.append)
    assert any("attnzoo-halves 0.2, was 0.1" in event.get("text", "") for event in told)


def test_a_missing_plugin_is_named_with_what_installs_it(plugged, site):
    site.remove()
    assert open_run(plugged).log()  # what was written can be read
    for verb in ("eval", "resume", "heatmap", "repro", "graft --recipe ham_b"):
        done = cli(*verb.split(), str(plugged), code=2)
        assert (
            "error[AZ205]: `halves/halved` belongs to the plugin `halves`, which is not installed"
            in done.output
        )
        assert "help: `pip install attnzoo-halves==0.1`" in done.output
        assert "this was made with attnzoo-halves 0.1" in done.output
    assert cli("probe", str(plugged), "entropy", code=2).output.count("pip install attnzoo-halves==0.1") == 1


def test_a_plugin_that_offers_it_no_more(plugged, site):
    site.install(version="0.2", source=PLUGIN.replace('name="halved"', 'name="thirds"'))
    with pytest.warns(VersionWarning), pytest.raises(RecipeError) as error:
        open_run(plugged).model()
    fault = error.value.diagnostics[0]
    assert fault.code == "AZ830" and "no mechanism `halved` any more" in fault.message
    assert "attnzoo-halves 0.1" in fault.why and "attnzoo-halves 0.2" in fault.why
    assert fault.help == "`pip install attnzoo-halves==0.1`"


@pytest.mark.parametrize(
    "direct, says",
    [
        ({"url": "file:///home/ann/halves", "dir_info": {"editable": True}}, "a folder that is edited"),
        ({"url": "file:///home/ann/halves", "dir_info": {}}, "a file or folder"),
        (
            {"url": "https://ann:secret@example.org/halves?token=1", "vcs_info": {"vcs": "git", "commit_id": "ab12"}},
            "git+https://example.org/halves@ab12",
        ),
        ({"url": "https://example.org/halves-0.1.whl", "archive_info": {}}, "https://example.org/halves-0.1.whl"),
    ],
    ids=["editable", "path", "git", "archive"],
)  # fmt: skip
def test_what_came_from_no_index_is_never_asked_of_one(direct, says, site):
    site.install(direct=direct)
    loaded = load(WITH_PLUGIN)
    made = made_with(resolve(loaded).entries)
    assert not any(word in made.model_dump_json() for word in ("/home", "ann:", "secret", "?token"))
    site.remove()
    with pytest.raises(RecipeError) as error:
        resolve(replace(loaded, made_with=made))
    fault = error.value.diagnostics[0]
    assert fault.code == "AZ205" and says in fault.help and "pip install attnzoo" not in fault.help


def test_a_build_with_a_local_version_is_on_no_index():
    assert "pip install" not in Plugin(distribution="x", version="1.0+mine", origin="index").how_to_get
    assert "pip install" not in Plugin().how_to_get


# Saved models


@pytest.fixture
def saved(site, tmp_path):
    """A model with the plugin, as `timm.create_model("local-dir:...")` loads it."""
    site.install()
    save(attnzoo.compose(WITH_PLUGIN), tmp_path / "saved")
    return tmp_path / "saved"


def created(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_a_saved_model_says_what_it_was_made_with(saved, site):
    config = json.loads((saved / "config.json").read_text())
    made = config["model_args"]["made_with"]
    assert made["plugins"]["halves"]["version"] == "0.1" and made["timm"] == timm.__version__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        created(saved)
    site.install(version="0.2")
    with pytest.warns(VersionWarning) as caught:
        again = created(saved)
    assert len(caught) == 1
    save(again, saved.parent / "again")
    config = json.loads((saved.parent / "again" / "config.json").read_text())
    assert config["model_args"]["made_with"]["plugins"]["halves"]["version"] == "0.2"
    site.remove()
    with pytest.raises(RecipeError) as error:
        created(saved)
    assert error.value.code == "AZ205" and "pip install attnzoo-halves==0.1" in str(error.value)
    donor = cli("graft", str(saved), "--recipe", "ham_b", code=2)
    assert "pip install attnzoo-halves==0.1" in donor.output


def test_a_saved_graft_says_it_too(site, tmp_path):
    site.install()
    graft, _ = attnzoo.graft(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1), WITH_PLUGIN)
    attnzoo.save_graft(graft, tmp_path / "graft")
    site.remove()
    with pytest.raises(RecipeError) as error:
        created(tmp_path / "graft")
    assert "pip install attnzoo-halves==0.1" in str(error.value)
    attnzoo.ungraft(tmp_path / "graft")  # the donor needs no plugin


def test_a_bare_name_means_what_it_meant(saved, site):
    """Another plugin offers the same name: it is not taken in the place of the one that is missing, nor is it a riddle."""
    other = PLUGIN.format(share="0.5")
    site.remove()
    (site.folder / "az_other.py").write_text(other)
    info = site.folder / "az_other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: az-other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[attnzoo]\nother = az_other\n")
    site.look()
    assert "other" in [entry.plugin for entry in resolve(load(WITH_PLUGIN)).entries]
    with pytest.raises(RecipeError) as error:
        created(saved)
    assert error.value.code == "AZ205" and "`halves/halved`" in str(error.value)


def test_a_name_that_only_a_plugin_or_a_file_registers_is_not_written(tmp_path):
    """`config.json` names what timm knows wherever attnzoo is: a shipped recipe's model, or the one without a name."""
    own = tmp_path / "mine.yaml"
    own.write_text(
        RECIPE.replace("name: tiny", "name: mine").replace("kind: vit", "kind: vit\n  registers: my_vit")
    )
    save(attnzoo.compose(own), tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architecture"] == "attnzoo_vit"
    created(tmp_path / "saved")
    assert attnzoo.compose("ham_a", device="meta").pretrained_cfg["architecture"] == "ham_vit_a"


HOSTILE = {
    "a number": 5,
    "no versions": {},
    "a command in a name": {"plugins": {"halves": {"distribution": "x; rm -rf ~"}}},
    "a command in a version": {"plugins": {"halves": {"distribution": "x", "version": "1 && reboot"}}},
    "an option": {"plugins": {"halves": {"distribution": "--index-url=http://evil"}}},
    "a command in an origin": {"plugins": {"halves": {"origin": "git+https://x/$(id)"}}},
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.sample(3)
def test_a_record_that_is_none(name, saved):
    config = json.loads((saved / "config.json").read_text())
    made = config["model_args"]["made_with"]
    config["model_args"]["made_with"] = (
        made | HOSTILE[name] if HOSTILE[name] and HOSTILE[name] != 5 else HOSTILE[name]
    )
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError) as error:
        created(saved)
    assert error.value.code == "AZ831"


def test_a_configuration_without_a_record_loads(saved):
    config = json.loads((saved / "config.json").read_text())
    del config["model_args"]["made_with"]
    (saved / "config.json").write_text(json.dumps(config))
    created(saved)


# Fingerprints of data


def test_data_of_other_bits_have_another_fingerprint():
    labels, pixels = torch.arange(4), torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    one = Images(labels, pixels)
    sides = [
        one,
        Images(labels.flip(0), pixels),
        Images(labels, pixels.clone().index_fill_(0, torch.tensor([3]), 1)),
        Images(labels, pixels.reshape(4, 1, 4, 1)),
        replace(one, size=4),
    ]
    assert len({fingerprint(side) for side in sides}) == len(sides)
    assert fingerprint(one) == fingerprint(Images(labels.clone(), pixels.clone()))
    numbers = InMemory(torch.zeros(2, 3), torch.zeros(2, 3))
    assert fingerprint(numbers) != fingerprint(InMemory(torch.zeros(2, 3), torch.ones(2, 3)))
    pairs = Pairs(((1,), (2,)), ((3,), (4,)), ("a", "b"), ("c", "d"))
    others = [replace(pairs, sources=((1, 2), ())), replace(pairs, target_texts=("c", "e"))]
    assert len({fingerprint(side) for side in (pairs, *others)}) == 3
    assert fingerprint(object()) == ""


def test_a_folder_of_images_is_known_by_its_files_wherever_it_lies(tmp_path):
    from PIL import Image

    for number in range(8):
        file = tmp_path / "one" / "abcd"[number % 4] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(file)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    before, moved = (fingerprint(load_folder(tmp_path / name).train) for name in ("one", "two"))
    assert before == moved
    changed = load_folder(tmp_path / "two").train.paths[0]
    Image.new("RGB", (4, 4), (9, 0, 0)).save(changed)
    assert fingerprint(load_folder(tmp_path / "two").train) != before


# Installed by pip


RECIPE_WITH_HAAR = """
recipe: 1
name: small
host:
  kind: vit
  base: vit_tiny_patch16_224
  model: {img_size: 8, patch_size: 2, embed_dim: 16, depth: 1, num_heads: 2, in_chans: 3}
attention: wavelets/haar
train: {data: digits, size: 8, epochs: 1, batch_size: 512}
"""


@pytest.mark.slow  # an environment is made and a sample plugin is installed in it, twice
def test_a_plugin_that_pip_installed(tmp_path):
    environment, sources, wheels = (tmp_path / name for name in ("environment", "sources", "wheels"))
    venv.create(environment, with_pip=False, symlinks=True)
    site = next(environment.glob("lib/python*/site-packages"))
    site.joinpath("this.pth").write_text(
        f"{ROOT}\nimport site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    )
    shutil.copytree(SAMPLES / "attnzoo-wavelets", sources, ignore=shutil.ignore_patterns("__pycache__"))
    recipe = tmp_path / "small.yaml"
    recipe.write_text(RECIPE_WITH_HAAR)

    def python(*command, code=0):
        return python_run(*map(str, command), python=environment / "bin" / "python", code=code)

    def install(version):
        text = (sources / "pyproject.toml").read_text()
        (sources / "pyproject.toml").write_text(re.sub('version = ".*"', f'version = "{version}"', text))
        quiet = ["--quiet", "--no-deps", "--disable-pip-version-check"]
        python("-m", "pip", "wheel", *quiet, "--no-build-isolation", "--wheel-dir", wheels, sources)
        found = ["--no-index", "--find-links", wheels, f"attnzoo-wavelets=={version}"]
        python("-m", "pip", "install", *quiet, *found)

    def attnzoo(*arguments, code=0):
        done = python("-m", "attnzoo", *arguments, code=code)
        return done.stdout + done.stderr

    install("0.1.0")
    attnzoo("train", recipe, "--out", tmp_path / "run")
    attnzoo("compose", recipe, "--out", tmp_path / "model")
    assert "the same bits up to step 3 of 3" in attnzoo("repro", tmp_path / "run")
    install("0.2.0")
    told = attnzoo("repro", tmp_path / "run", code=1)
    assert "first difference: plugin attnzoo-wavelets: 0.1.0 → 0.2.0 (recorded → here)" in told
    assert "the same bits up to step 3 of 3" in told
    assert "warning: made with attnzoo-wavelets 0.1.0, here is" in attnzoo("eval", tmp_path / "run")
    python("-m", "pip", "uninstall", "--quiet", "--yes", "attnzoo-wavelets")
    for verb in ("eval", "repro"):
        assert "`pip install attnzoo-wavelets==0.1.0`" in attnzoo(verb, tmp_path / "run", code=2)
    code = f"import attnzoo, timm; timm.create_model('local-dir:{tmp_path / 'model'}')"
    assert "`pip install attnzoo-wavelets==0.1.0`" in python("-c", code, code=1).stderr

"""Figures of the gallery: what is drawn is what happens, and is never stale."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.autograd.functional import jacobian

from attnzoo.core import NO_MASK, Card, Family, Fusion, FusionCard, Head, Law, Mechanism
from attnzoo.gallery import cache as caches
from attnzoo.gallery import drawing, flow, network
from attnzoo.gallery.cache import Cache, dependencies
from attnzoo.gallery.checked import checked
from attnzoo.gallery.cost import cost
from attnzoo.gallery.drawing import draw_all
from attnzoo.gallery.flow import trace
from attnzoo.gallery.influence import QUERIES, influence, measured
from attnzoo.gallery.maps import shown
from attnzoo.gallery.network import digits, network_for
from attnzoo.gallery.tracing import MOST, Box, Flow
from attnzoo.zoo import Entry, load_zoo

ZOO = load_zoo()


def entry(name: str) -> Entry:
    return (ZOO.mechanisms if name in ZOO.mechanisms else ZOO.fusions)[name]


def all_entries() -> list[Entry]:
    return [*ZOO.mechanisms.values(), *ZOO.fusions.values()]


def foreign(cls: type, file: str = __file__) -> Entry:
    return Entry(cls.card.name, cls, "others", "1.0", file, cls.card)


# Cache


def test_what_is_kept_is_found_and_what_changed_is_made_anew(tmp_path):
    cache, made = Cache(tmp_path), []

    def make(text: str):
        return lambda: made.append(text) or text.encode()

    first = cache.file("a-flow.png", {"source": "1"}, make("one"))
    assert cache.file("a-flow.png", {"source": "1"}, make("again")) == first and made == ["one"]
    second = cache.file("a-flow.png", {"source": "2"}, make("two"))
    assert second != first and second.read_text() == "two" and first.read_text() == "one"
    assert cache.file("b-flow.png", {"source": "1"}, make("other")).read_text() == "other"


def test_what_could_not_be_made_leaves_nothing(tmp_path):
    def fails() -> bytes:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Cache(tmp_path).file("a.png", {}, fails)
    assert not list(tmp_path.iterdir())


def test_a_component_that_changed_is_not_found_under_its_old_key(tmp_path, monkeypatch):
    """Each of: its own file, a file of the rooms that draw it, an option, a version."""
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "changing_plugin"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "maths.py").write_text("FACTOR = 1\n")
    (package / "one.py").write_text("class One:\n    pass\n")
    one = Entry("one", import_module("changing_plugin.one").One, "changing", "1.0", str(package / "one.py"))
    for file in package.rglob("*.py"):
        os.utime(file, (0, 0))

    def key(entry: Entry = one, **settings: object) -> str:
        caches._sources.cache_clear()
        return caches.key_of(dependencies(entry, ["gallery/flow.py"], **settings))

    before = key()
    assert key() == before
    assert key(seed=1) != before and key(replace(one, version="1.1")) != before
    (package / "maths.py").write_text("FACTOR = 2\n")
    os.utime(package / "maths.py", (0, 0))
    changed = key()
    assert changed != before
    os.utime(
        package / "maths.py"
    )  # touched after this process read it: what runs may be what was there before
    assert key() not in (before, changed)
    monkeypatch.setattr(caches, "VERSION", "0.0.0")
    assert key() != changed
    caches._sources.cache_clear()


@pytest.mark.parametrize("part", drawing.CODE)
def test_all_code_that_takes_part_is_there(part):
    for name in drawing.CODE[part]:
        assert (caches.ROOT / name).exists(), name
    own = {"flow": "flow", "digits": "influence", "cost": "cost", "checked": "checked"}[part]
    assert f"gallery/{own}.py" in drawing.CODE[part]


KILLED = """
import os, signal, sys
from attnzoo.gallery.cache import Cache
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Cache(sys.argv[1]).file("a.png", {}, lambda: b"half")
"""
TOGETHER = """
import sys, time
from attnzoo.gallery.cache import Cache
cache = Cache(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for i in range(40):
    path = cache.file("a.png", i, lambda: bytes([i]) * 300_000)
    assert path.read_bytes() == bytes([i]) * 300_000, i
"""


@pytest.mark.slow  # ten seconds: processes that import torch
def test_a_killed_build_leaves_nothing_that_is_found(tmp_path):
    dead = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert dead.returncode < 0
    (aside,) = tmp_path.iterdir()
    cache = Cache(tmp_path)
    whole = cache.file("a.png", {}, lambda: b"whole")
    assert whole.read_bytes() == b"whole"
    assert cache.sweep([whole]) == []  # it may be that of a build that is under way
    assert cache.sweep([whole], older=0) == [aside] and list(tmp_path.iterdir()) == [whole]


@pytest.mark.slow  # ten seconds: processes that import torch
def test_two_builds_in_one_folder(tmp_path):
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for one in both:
        assert one.stdout.readline() == b"ready\n"
    for one in both:
        one.stdin.write(b"\n")
        one.stdin.flush()
    assert [one.wait(60) for one in both] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 40
    for one in both:
        one.stdin.close(), one.stdout.close()


def test_what_is_used_is_not_swept(tmp_path):
    cache = Cache(tmp_path)
    used, unused = (cache.file("a.png", i, lambda: b"") for i in range(2))
    for path in (used, unused):
        os.utime(path, (0, 0))
    cache.file("a.png", 0, lambda: b"never")  # is touched
    assert cache.sweep([]) == [unused] and used.exists()


# Flow


def named(found: Flow) -> set[tuple[str, str]]:
    return {(found.boxes[i].label, found.boxes[j].label) for i, j in found.arrows}


def test_flow_of_softmax():
    found = trace(entry("softmax"))
    assert named(found) == {
        ("q", "product"), ("k", "product"), ("product", "scores"), ("scores", "softmax"), ("softmax", "weights"),
        ("weights", "product"), ("v", "product"), ("product", "output"),
    }  # fmt: skip
    assert len(found.boxes) == 9 and len(found.arrows) == 8 and not found.note
    (v,), (weights,), products = found.named("v"), found.named("weights"), found.named("product")
    assert found.boxes[v].shape == "b h m d" and found.boxes[weights].shape == "b h n m"
    last = max(products)
    assert {(v, last), (weights, last)} <= found.arrows and (v, min(products)) not in found.arrows


def test_flow_of_agent():
    found = trace(entry("agent"))
    kinds = {box.label: box.kind for box in found.boxes}
    assert kinds["qkv"] == kinds["proj"] == kinds["local"] == "learnt" and kinds["weights_agents"] == "tap"
    assert found.leads("x", "qkv") and found.leads("qkv", "scores_agents") and found.leads("qkv", "scores")
    assert (
        found.leads("weights_agents", "proj")
        and found.leads("weights", "proj")
        and found.leads("local", "proj")
    )
    assert not found.leads("x", "proj") and not found.leads("scores", "weights_agents")
    assert found.leads("proj", "output")


def test_flow_of_linformer():
    found = trace(entry("linformer"))
    assert found.leads("k", "key_slots") and found.leads("v", "value_slots")
    assert not found.leads("q", "key_slots") and not found.leads("k", "value_slots")
    assert found.boxes[found.named("weights")[0]].shape == "b h n r"


def test_flow_of_parts_with_several_parameters():
    """Each LSTM is one box, called after its part; the eight heads are eight times of it."""
    found = trace(entry("bilstm"))
    assert found.leads("pre", "onwards") and found.leads("pre", "backwards") and found.leads("post", "output")
    assert not found.leads("onwards", "backwards") and not found.leads("pre", "post")
    assert {found.boxes[found.named(name)[0]].times for name in ("onwards", "backwards")} == {8}
    assert trace(entry("convshare")).leads("product", "proj") and trace(entry("convshare")).named("q")


def test_flow_of_fusions():
    serial, by_depth = trace(entry("serial")), trace(entry("by_depth"))
    assert named(serial) == {("x", "branch 1"), ("branch 1", "branch 2"), ("branch 2", "output")}
    assert not by_depth.leads("branch 2", "output") and by_depth.leads("branch 1", "output")
    assert trace(entry("gated")).leads("x", "gate")


def test_flow_of_what_ignores_its_input():
    assert named(trace(entry("nothing"))) == {("x", "fill"), ("fill", "output")}


class Unseen(Mechanism):
    """Leaves PyTorch on its way."""

    card = Card("unseen", Family.MIXING, "numpy in the middle", taps={"gate": "b n c"})

    def mix(self, x, source, *, mask, layout):
        return torch.from_numpy(self.gate(x).numpy() * 2)


class Broken(Mechanism):
    """Cannot be built."""

    card = Card("broken", Family.MIXING, "fails")

    def __init__(self, site):
        raise RuntimeError("its author was tired")

    def mix(self, x, source, *, mask, layout):
        return x


def test_what_cannot_be_followed_is_said():
    found = trace(foreign(Broken))
    assert "its author was tired" in found.note and named(found) == {("x", "broken"), ("broken", "output")}
    found = trace(foreign(Unseen))  # numbers leave PyTorch, so no arrow is invented
    assert "could not be followed" in found.note or not found.leads("gate", "output")
    flow.draw(found)


def rectangles(found: Flow) -> list[tuple[float, float, float, float]]:
    """Of each box and of each place that an arrow passes: left, right, row."""
    widths = [flow.wide(name, box) for name, box in zip(flow.names_of(found), found.boxes, strict=True)]
    rows, chains = flow._rows(found)
    centres = flow._centres(rows, chains, widths)
    half = {item: widths[item] / 2 if isinstance(item, int) else flow.THIN / 2 for item in centres}
    return [(centres[item] - half[item], centres[item] + half[item], row, item) for row, items in enumerate(rows) for item in items]  # fmt: skip


def apart(found: Flow) -> None:
    """Nothing lies on anything else; an arrow that passes a row has a place of its own there."""
    boxes = rectangles(found)
    for k, (left, right, row, item) in enumerate(boxes):
        for other_left, other_right, other_row, other in boxes[k + 1 :]:
            assert row != other_row or right <= other_left + 1e-6 or other_right <= left + 1e-6, (item, other)
    at = {item: row for _, _, row, item in boxes}
    for i, j in found.arrows:
        assert i >= j or {
            row for (*_, row, item) in boxes if isinstance(item, tuple) and item[:2] == (i, j)
        } == set(range(at[i] + 1, at[j]))


@pytest.mark.parametrize(
    "name", ["slot", "cascaded_group", "native_sparse", "attentional", "soft", "perceiver"]
)
def test_boxes_do_not_overlap(name):
    found = trace(entry(name))
    assert len(found.boxes) <= MOST and not found.note
    apart(found)


def test_crowded_rows_are_spread():
    boxes = tuple(Box(f"a rather long name {i}", "learnt", "b n c") for i in range(8))
    apart(Flow((Box("x", "input"), *boxes, Box("output", "output")),
               frozenset({(0, i) for i in range(1, 9)} | {(i, 9) for i in range(1, 9)} | {(0, 9)})))  # fmt: skip


@pytest.mark.slow
def test_every_component_has_a_legible_flow():
    for one in all_entries():
        found = trace(one)
        assert len(found.boxes) <= MOST and not found.note, one.name
        apart(found)
        assert flow.draw(found).pixels[0] <= 640, one.name


# Influence


def untrained(name: str):
    return influence(entry(name), steps=0)


def test_influence_is_the_jacobian():
    net = network_for(entry("softmax"))
    image = digits(14)[1].images[3:4]
    (x,), _ = net.takes(image)
    row, column = QUERIES[1]
    whole = jacobian(lambda x: net.component(x)[0, 14 * row + column], x.detach())  # (c 1 n c)
    expected = whole[:, 0].square().sum(dim=(0, 2)).sqrt().unflatten(0, (14, 14))
    torch.testing.assert_close(measured(net, image, (QUERIES[1],))[0], expected, rtol=1e-4, atol=1e-7)


def test_influence_of_softmax_reaches_everything():
    found, _ = untrained("softmax")
    assert found.first.shape == (4, 14, 14) and bool((found.first > 0).all()) and found.accuracy is None


def test_influence_of_a_local_one_ends_at_its_reach():
    found, net = untrained("neighborhood")
    reach = net.component.attn.inner.reach()
    places = torch.stack(torch.meshgrid(torch.arange(14), torch.arange(14), indexing="ij"), dim=-1)
    for (row, column), heat in zip(QUERIES, found.first, strict=True):
        far = (places - torch.tensor([row, column])).abs().amax(dim=-1) > reach
        assert bool((heat[far] == 0).all()) and float(heat[row, column]) > 0
        assert bool(far.any()) and int((heat > 0).sum()) == 7 * 7  # at an edge the window moves inwards


def test_influence_of_fourier_does_not_depend_on_the_image():
    found, net = untrained("fourier")
    other = measured(net, digits(14)[1].images[7:8], QUERIES)
    assert bool((found.first > 0).float().mean() > 0.9)
    torch.testing.assert_close(found.first, other, rtol=1e-3, atol=1e-6)


def test_influence_of_nothing_and_of_a_recurrence():
    assert not untrained("nothing")[0].first.any()
    first = untrained("retention")[0].first.flatten(1)
    for (row, column), heat in zip(QUERIES, first, strict=True):  # tokens in their order
        now = 14 * row + column
        assert bool((heat[: now + 1] > 0).any()) or not heat.any()


def test_training_changes_it_and_repeats(monkeypatch):
    monkeypatch.setattr(network, "STEPS", 4)
    first, again = (influence(entry("squeeze_excite"))[0] for _ in range(2))
    assert first.steps == 4 and 0 <= first.accuracy <= 1 and first.tested == 355
    assert not torch.equal(first.trained, first.first) and torch.equal(first.trained, again.trained)
    assert first.accuracy == again.accuracy


@pytest.mark.parametrize(
    "name", ["map_pool", "gated", "cross_scale", "class_cross", "conv_transformer", "region"]
)
def test_pools_fusions_and_what_reads_a_context(name):
    found, net = untrained(name)
    assert found.pools == (name == "map_pool") and found.reads == (
        name in ("cross_scale", "class_cross", "conv_transformer")
    )
    assert len(found.first) == (1 if found.pools else 4) and bool(found.first[0].any())
    assert bool(found.note) == (found.reads or name == "gated")
    assert net.prefix == (name == "class_cross") and net.side == (16 if name == "conv_transformer" else 14)


def test_the_random_state_of_others_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    influence(entry("performer"), steps=1)
    shown(network_for(entry("performer")), digits(14)[1].images[:1])
    trace(entry("performer"))
    assert torch.equal(torch.get_rng_state(), before)


# Heat maps, cost, checks


def test_heat_maps_are_means_over_the_tokens_that_look():
    net = network_for(entry("softmax"))
    found = shown(net, digits(14)[1].images[3:4])
    assert list(found.heads) == ["softmax"] and found.heads["softmax"].shape == (4, 14, 14)
    torch.testing.assert_close(found.heads["softmax"].sum(dim=(1, 2)), torch.ones(4))
    none = shown(network_for(entry("fourier")), digits(14)[1].images[3:4])
    assert not none.heads and "without weights" in none.absent["fourier"]


def test_cost_is_that_of_the_paper():
    found = cost(entry("softmax"))
    for n, flops in found.flops.items():
        assert flops == 8 * n * 384**2 + 4 * n**2 * 384  # projections, and two products
    assert found.params == 4 * (384**2 + 384) and found.flops == found.baseline
    assert "alone are counted" in cost(entry("fourier")).why


class Doubled(Head):
    """Claims more than it keeps."""

    card = Card(
        "doubled",
        Family.DOT_PRODUCT,
        "twice the values",
        masks={"keys"},
        laws={Law.BOUNDED, Law.LINEAR_IN_VALUES},
    )

    def attend(self, q, k, v, *, mask, layout):
        return 2 * v


class Leaking(Fusion):
    """Adds the mean over all tokens, those that do not exist among them."""

    card = FusionCard("leaking", "a sum and its mean over tokens", masks={"keys"})

    def merge(self, branches, x, mask=NO_MASK):
        return sum(branches) + sum(branches).mean(dim=-2, keepdim=True)


def test_verdicts_of_laws_and_masks():
    found = checked(foreign(Doubled), examples=3)
    assert found.laws == {"linear_in_values": "holds", "bounded": "fails"} and found.masks["keys"] == "fails"
    assert "check_bounded" in found.failed and found.versions["others"] == "1.0"
    good = checked(entry("mean"), examples=2)
    assert set(good.laws.values()) == {"holds"} and not good.failed and good.passed > 20
    assert good.masks == dict.fromkeys(("causal", "keys", "pairs"), "holds")
    assert checked(foreign(Leaking), examples=25).masks == {"keys": "fails"}


# All together


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(network, "STEPS", 2)
    monkeypatch.setattr(drawing.checks, "EXAMPLES", 1)
    monkeypatch.setattr(drawing.costs, "SIDES", (14,))
    monkeypatch.setattr(drawing.checks.checked, "__defaults__", (1,))


def test_one_that_fails_stops_no_other(tmp_path, quick):
    said: list[str] = []
    wanted = [foreign(Broken), entry("squeeze_excite")]
    found = draw_all(tmp_path / "put", wanted, Cache(tmp_path / "kept"), workers=0, report=said.append)
    assert list(found) == ["others/broken", "attnzoo/squeeze_excite"] and len(said) == 2
    broken, whole = found.values()
    assert "not installed" in broken.missing["digits"] and "tired" in broken.pictures["flow"].text
    assert broken.checked["failed"] and not whole.checked["failed"]
    assert set(whole.pictures) == {"flow", "influence", "cost"} and set(whole.missing) == {"maps"}
    assert whole.numbers["params"] > 0 and whole.numbers["steps"] == 2 and 0 <= whole.numbers["accuracy"] <= 1
    for kind, picture in whole.pictures.items():
        image = Image.open(picture.path)
        assert picture.path.name == f"squeeze_excite-{kind}.png" and image.size == (
            2 * picture.width,
            2 * picture.height,
        )
        assert picture.width <= 640 and picture.path.stat().st_size < 60_000 and picture.text.endswith(".")
        assert image.convert("RGB").getcolors(256), kind  # few colours

    def never(*_):
        raise AssertionError("it was kept")

    again_of = pytest.MonkeyPatch()
    again_of.setattr(drawing.influences, "influence", never)
    again_of.setattr(drawing.flows, "trace", never)
    try:
        again = draw_all(tmp_path / "put", wanted[1:], Cache(tmp_path / "kept"), workers=0)[
            "attnzoo/squeeze_excite"
        ]
    finally:
        again_of.undo()
    assert replace(again, seconds=0) == replace(whole, seconds=0)


DEADLY = """
import os
from attnzoo.core import Card, Family, Mechanism

class Deadly(Mechanism):
    card = Card("deadly", Family.MIXING, "ends its process")

    def __init__(self, site):
        os._exit(1)

    def mix(self, x, source, *, mask, layout):
        return x
"""


@pytest.mark.slow
def test_a_component_that_ends_its_process_stops_no_other(tmp_path, monkeypatch):
    (tmp_path / "deadly_plugin.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(tmp_path)
    deadly = foreign(import_module("deadly_plugin").Deadly, str(tmp_path / "deadly_plugin.py"))
    unhandable = foreign(
        type("Local", (Unseen,), {"__module__": "nowhere", "card": replace(Unseen.card, name="local")})
    )
    wanted = [deadly, entry("squeeze_excite"), unhandable, entry("mean")]
    found = draw_all(tmp_path / "put", wanted, Cache(tmp_path / "kept"))
    assert set(found["others/deadly"].missing.values()) == {"the process that drew it ended"}
    assert all("another process" in why for why in found["others/local"].missing.values())
    for name in ("squeeze_excite", "mean"):
        assert {"flow", "influence", "cost"} <= set(found[f"attnzoo/{name}"].pictures)
    assert found["attnzoo/mean"].numbers["accuracy"] > 0.5


@pytest.mark.slow
def test_every_component_is_drawn(tmp_path):
    found = draw_all(tmp_path / "put", all_entries(), Cache(tmp_path / "kept"))
    for name, one in found.items():
        assert {"flow", "influence"} <= set(one.pictures) and set(one.missing) <= {"maps", "cost"}, (
            name,
            one.missing,
        )
        assert not one.checked["failed"], name
    size = sum(path.stat().st_size for path in (tmp_path / "put").iterdir())
    assert size < 15e6 and sum(one.seconds for one in found.values()) < 2 * 540


def test_folders_that_cannot_be_written_are_refused(tmp_path):
    from attnzoo.errors import ZooError

    file = Path(tmp_path / "file")
    file.write_text("")
    with pytest.raises(ZooError, match="AZ960"):
        Cache(file)
    with pytest.raises(ZooError, match="AZ961"):
        draw_all(file, [], Cache(tmp_path / "kept"))

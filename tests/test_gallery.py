"""The gallery: pages, BibTeX, relatives, overview, the folder it is kept in; and the whole, by Sphinx and in a browser."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from typer.testing import CliRunner

from attnzoo.catalogue.lists import form_of
from attnzoo.cli.app import app
from attnzoo.core import Law, Paper
from attnzoo.errors import ZooError
from attnzoo.gallery import build, folder, overview, write, writing
from attnzoo.gallery.bibtex import authors, bibtex, key
from attnzoo.gallery.drawing import Drawn, Shown
from attnzoo.gallery.markdown import fenced, paragraphs, prose, table
from attnzoo.gallery.pages import Pages, files
from attnzoo.gallery.relatives import differences, relatives
from attnzoo.recipe import load
from attnzoo.zoo import Zoo, manager

ROOT = Path(__file__).parent.parent
ZOO = Zoo.of()
COMPONENTS = [entry for registry in ZOO.registries[:-1] for entry in registry.values()]
FEW = ("linformer", "gated", "map_pool", "entropy", "temperature")


@pytest.fixture
def sample(monkeypatch):
    """A zoo with the sample plugin, as if it were installed."""
    monkeypatch.syspath_prepend(str(ROOT / "plugins" / "attnzoo-wavelets" / "src"))
    plugin = __import__("attnzoo_wavelets")
    zoo = Zoo.of(plugins=[("wavelets", plugin)])
    assert not zoo.problems
    monkeypatch.setattr(manager, "_zoo", zoo)
    return zoo


# BibTeX


FIELDS = {
    "misc": {"title", "author", "year", "eprint", "archivePrefix", "url", "doi", "howpublished"},
    "inproceedings": {"title", "author", "year", "booktitle"},
}


def parsed(entry: str) -> tuple[str, str, dict[str, str]]:
    """Kind, key and fields of one BibTeX entry, by its grammar; what is beyond it is an AssertionError."""
    kind, key, body = re.fullmatch(r"@([a-z]+)\{([a-z0-9]+),\n(.*)\n\}", entry, re.S).groups()
    fields = {}
    for line in body.split("\n"):
        name, value = re.fullmatch(r"  ([A-Za-z]+) = \{(.+)\},", line).groups()
        depth = 0
        for letter in value:
            depth += {"{": 1, "}": -1}.get(letter, 0)
            assert depth >= 0, line
        assert depth == 0 and name not in fields, line
        assert not re.search(r"(?<!\\)[&%$#_~^]", value) or name in ("url", "doi", "eprint"), line
        fields[name] = value
    assert fields.keys() <= FIELDS[kind]
    assert kind == "misc" or fields.keys() == FIELDS[kind]  # all of these are required
    return kind, key, fields


def test_every_paper_is_an_entry_under_a_key_of_its_own():
    seen: dict[str, str] = {}
    for entry in COMPONENTS:
        if paper := entry.value.card.paper:
            _, name, fields = parsed(bibtex(paper))
            assert fields["title"] == f"{{{paper.title}}}" and fields["author"], entry.name
            assert fields.get("year", "") == str(paper.year or "")
            if paper.ref.startswith("arXiv:"):
                assert (
                    fields["eprint"] == paper.ref.removeprefix("arXiv:")
                    and fields["archivePrefix"] == "arXiv"
                )
            assert seen.setdefault(name, bibtex(paper)) == bibtex(paper), entry.name
    assert len(seen) > 100


PAPERS = [
    (Paper("A {b_c} \\ 50 % & more", "Ng, A., Li, F.-F. and Xu, B.", 2020, "doi:10.1109/34.192463"), "ng2020bc", "misc"),
    (Paper("Swin Transformer V2: Scaling Up", "Liu et al.", 2021, "arXiv:2111.09883v2"), "liu2021swintransformerv2", "misc"),
    (Paper("In Two Places", "Doe", 2022, "ICLR 2023, arXiv:cs/0601001"), "doe2022two", "misc"),
    (Paper("On Something", "Martínez-Marín et al."), "martinezmarinsomething", "misc"),
    (Paper("注意", "王", None, "NeurIPS"), "paper", "misc"),
    (Paper("A Thing", "J. Doe & M. van den Oord", 2019, "ICML 2019"), "doe2019thing", "inproceedings"),
    (Paper("Off By One", "Miller", 2023, "evanmiller.org/attention-is-off-by-one.html"), "miller2023off", "misc"),
    (Paper("A\n  Thing", "", 2001, "https://a.org/b?c={d}%20e"), "2001thing", "misc"),
]  # fmt: skip


@pytest.mark.parametrize(("paper", "name", "kind"), PAPERS)
def test_entries_of_strange_papers(paper, name, kind):
    found, its_key, fields = parsed(bibtex(paper))
    assert (found, its_key) == (kind, name) == (kind, key(paper))
    if "arXiv:" in paper.ref:
        assert fields["url"] == f"https://arxiv.org/abs/{paper.ref.rpartition(':')[2]}"
    if "doi" in paper.ref:
        assert fields["doi"] == "10.1109/34.192463"
    if "/" in paper.ref and "doi" not in paper.ref:
        assert fields["url"].startswith("https://")


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("Vaswani et al.", ["Vaswani", "others"]),
        ("Dao, Gu", ["Dao", "Gu"]),
        ("Press, Smith and Lewis", ["Press", "Smith", "Lewis"]),
        ("Vaswani, A., Shazeer, N. and Parmar, N.", ["Vaswani, A.", "Shazeer, N.", "Parmar, N."]),
        ("A. Vaswani, N. Shazeer, et al.", ["A. Vaswani", "N. Shazeer", "others"]),
        ("Ferdinand and Alexander", ["Ferdinand", "Alexander"]),
        ("DeepSeek-AI", ["DeepSeek-AI"]),
        ("", []),
    ],
)
def test_authors(said, found):
    assert authors(Paper("T", said)) == found


# Markdown


def shown(text: str) -> str:
    """What a paragraph of Markdown shows, code in ‹ ›; an AssertionError where it is more than a paragraph."""
    tokens = MarkdownIt("commonmark").enable("strikethrough").parse(text)
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"], tokens
    found = ""
    for child in tokens[1].children:
        assert child.type in ("text", "text_special", "code_inline"), child
        found += f"‹{child.content}›" if child.type == "code_inline" else child.content
    return found


@given(st.text(st.sampled_from("ab1 _*<>[](){}|~$#&;:!-+=.\\^√Σ̂ᵀ/@"), min_size=1).filter(str.strip))
def test_prose_says_what_it_says(text):
    assert shown(prose(text)) == " ".join(text.split())
    assert "$" not in re.sub(r"\\.", "", prose(text))  # formulas, to MyST


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("`W_out` times *x*, `a|b` or $x$", "‹W_out› times *x*, ‹a|b› or $x$"),
        ("``a ` b`` and {x}`y`", "‹a ` b› and {x}‹y›"),
        ("one ` alone_ _here_", "one ` alone_ _here_"),
        ("1. no list", "1. no list"),
        ("# no heading\nand <b>no</b> &amp; HTML", "# no heading and <b>no</b> &amp; HTML"),
        ("[no](link) [^note] [s]: x", "[no](link) [^note] [s]: x"),
        ("[s_1; s_2]: the heads", "[s_1; s_2]: the heads"),
        ("- no item", "- no item"),
        ("==", "=="),
    ],
)
def test_prose_keeps_code_alone(text, says):
    assert shown(prose(text)) == says


def test_docstrings_are_paragraphs_lists_and_lines():
    found = paragraphs("A line\ngoes on.\n\n    x = ```1\n    y = 2\n\n- one\n- two\n  goes on")
    assert found[0] == "A line goes on."
    (fence,) = MarkdownIt().parse(found[1])
    assert (fence.type, fence.info, fence.content) == ("fence", "text", "x = ```1\ny = 2\n")
    assert found[2] == "- one\n- two goes on"


def test_tables_keep_their_cells():
    text = table(("a", "b"), [("`x | y`", prose("p | q")), ("1", "2")])
    tokens = MarkdownIt().enable("table").parse(text)
    cells = [
        token
        for before, token in zip(tokens, tokens[1:], strict=False)
        if before.type in ("td_open", "th_open")
    ]
    assert ["".join(child.content for child in cell.children) for cell in cells] == [
        "a",
        "b",
        "x | y",
        "p | q",
        "1",
        "2",
    ]


def test_a_fence_is_longer_than_those_in_it():
    (token,) = MarkdownIt().parse(fenced("```` four ````", "text"))
    assert token.content == "```` four ````\n"


# relatives


def related(name: str) -> dict[str, str]:
    """What a page says of its relatives."""
    entry = next(registry[name] for registry in ZOO.registries if name in registry)
    return {near.entry.name: near.sentence for near in relatives(entry, ZOO)}


def test_relatives_of_linformer_by_hand():
    said = related("linformer")
    assert next(iter(said)) == "softmax" and len(said) == 5 and "linformer" not in said
    assert said["softmax"] == (
        "It is of the family `dot_product`, costs O(n²) instead of O(n), takes any number of tokens, decodes token by "
        "token, honours pairs and causal masks too and wins the laws `permutation_equivariant` and `bounded`."
    )
    assert said["efficient"] == (
        "It takes any number of tokens and wins the laws `permutation_equivariant` and `bounded`."
    )


def test_relatives_of_the_other_kinds_by_hand():
    assert related("mean")["gated"] == "It loses the law `symmetric`."
    assert related("rollout")["attention_flow"] == "Its claims are the same."
    assert related("temperature")["keep_top"] == "It changes `weights` and does not change `scores`."
    assert related("pairwise_cross")["global_local_cross"].startswith(
        "It reads from no context, needs a grid, asks for"
    )


@pytest.mark.parametrize("registry", ZOO.registries[:-1], ids=lambda registry: registry.kind)
def test_what_one_wins_the_other_loses(registry):
    """Of all pairs; and laws and masks are those in which the cards differ."""
    entries = list(registry.values())[::3]
    for one in entries:
        assert [near.entry for near in relatives(one, ZOO)] == [near.entry for near in relatives(one, ZOO)]
        for other in entries:
            there, back = differences(one, other), differences(other, one)
            assert len(there) == len(back) or abs(len(there) - len(back)) <= 3
            if one is other:
                assert there == []
            mine, its = (getattr(e.value.card, "laws", frozenset()) for e in (one, other))
            for verb, laws in (("wins", its - mine), ("loses", mine - its)):
                (said,) = [end for end in there if end.startswith(f"{verb} ")] or [""]
                named = set(re.findall(r"`(\w+)`", said))
                assert named == {str(law) for law in Law if law in laws} or (
                    len(laws) > 3 and said == f"{verb} {len(laws)} laws"
                )


# pages


def sections(text: str) -> dict[str, list]:
    """Tokens of a page below each heading; the title's come first."""
    found: dict[str, list] = {}
    tokens = MarkdownIt().enable("table").parse(text)
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            current = found.setdefault(tokens[i + 1].content, [])
        elif token.type != "heading_close" and tokens[i - 1].type != "heading_open":
            current.append(token)
    return found


CHECKED = {
    "date": "2026-01-31", "versions": {"attnzoo": "9.9", "torch": "2.8"}, "examples": 5, "passed": 31,
    "laws": {"permutation_equivariant": "fails"}, "masks": {"keys": "holds"},
    "skipped": {"step": "it has no cache"}, "failed": {"permutes": "token 3 moved | by 1"},
}  # fmt: skip


def drawing(there: Path, name: str) -> Drawn:
    """What might have been drawn of a component."""
    pictures = {}
    for kind in ("flow", "influence", "cost"):
        file = there / f"{name}-{kind}.png"
        Image.new("RGB", (400, 300), "navy").save(file)
        pictures[kind] = Shown(file, f"The {kind} of `{name}` [seen]", 200, 150)
    missing = {"maps": "its card names no tap called `weights`"}
    numbers = {"accuracy": 0.951, "tested": 360, "steps": 150, "network": "A fusion of x and y."}
    return Drawn(f"attnzoo/{name}", pictures, numbers, CHECKED, missing)


@pytest.mark.parametrize("name", FEW)
def test_a_page_has_its_parts(name, tmp_path):
    entry = next(registry[name] for registry in ZOO.registries if name in registry)
    card, kind = entry.value.card, form_of(entry.value)
    pages = Pages(ZOO)
    found = sections(pages.page(entry))
    assert list(found)[0] == name
    fences = {token.info: token.content for part in found.values() for token in part if token.type == "fence"}
    assert fences["{math}"].strip()
    if card.paper:
        assert parsed(fences["bibtex"].rstrip("\n"))[1] == key(card.paper)
    if kind in ("head", "pool", "fusion"):
        yaml = [token.content for token in found["In a recipe"] if token.type == "fence"]
        assert f": {name}\n" in yaml[0] or f"fuse: {name}," in yaml[0]
        assert load(yaml[1]).recipe.name in pages.users[entry.full_name]  # it can be copied
    links = [
        child.attrs["href"]
        for token in found["Relatives"]
        for child in token.children or ()
        if child.type == "link_open"
    ]
    assert len(links) >= 4
    here = Path(pages.files[entry.full_name]).parent
    assert {str(here / link) for link in links} <= set(pages.files.values())
    plain = Pages(ZOO, plain=True).page(entry)
    assert card.equation in [
        token.content.rstrip("\n") for token in sections(plain)[name] if token.type == "fence"
    ]


def test_a_page_shows_what_was_drawn_and_says_what_was_not(tmp_path):
    entry = ZOO.mechanisms["fourier"]
    found = sections(Pages(ZOO).page(entry, drawing(tmp_path, "fourier")))
    titles = list(found)
    order = [
        titles.index(title)
        for title in ("Data flow", "Who influences whom", "What it looks at", "What it costs")
    ]
    assert order == sorted(order)
    (picture,) = [token for token in found["Who influences whom"] if token.type == "fence"]
    assert picture.info == "{figure} pictures/fourier-influence.png"
    assert picture.content.splitlines() == [
        ":alt: Who influences whom in fourier", ":width: 200px", "", "The influence of `fourier` [seen]",
    ]  # fmt: skip
    (trained, *_) = [token.content for token in found["Who influences whom"] if token.type == "inline"]
    assert trained.endswith(
        "trained for 150 steps, after which it named 95.1% of 360 other digits rightly. A fusion of x and y."
    )
    (said,) = [token.content for token in found["What it looks at"] if token.type == "inline"]
    assert said == "Not drawn: its card names no tap called `weights`"
    checked = [token.content for token in found["How it is checked"] if token.type == "inline"]
    laws = dict(zip(checked[3::3], checked[5::3], strict=False))
    assert (laws["law `permutation_equivariant`"], laws["mask `keys`"]) == ("**fails**", "**holds**")
    assert "2026-01-31, with attnzoo 9.9, torch 2.8: 31 checks passed, with 5 drawn cases each." in checked
    assert (
        "`permutes` failed: token 3 moved | by 1" in checked and "`step` skipped: it has no cache" in checked
    )


def test_pages_of_equal_names_have_files_of_their_own(sample):
    found = files(sample)
    assert len(set(found.values())) == len(found) == sum(len(r) for r in sample.registries[:-1])
    assert found["wavelets/haar"] == "haar.md" and found["wavelets/band_energy"] == "probes/band_energy.md"
    twin = SimpleNamespace(full_name="two/softmax", name="softmax")
    zoo = SimpleNamespace(**{r.kind + "s": r for r in ZOO.registries})
    zoo.fusions = SimpleNamespace(
        kind="fusion", items=lambda: [("softmax", twin), ("two/x", replace_name(twin))]
    )
    names = files(zoo)
    assert names["two/softmax"] == "softmax-fusion.md" and names["two/x"] == "two-x.md"


def replace_name(entry):
    """Another entry."""
    return SimpleNamespace(full_name="two/x", name="x")


# the overview


class Elements(HTMLParser):
    """Elements of a page, in order, with their attributes and the text in them."""

    def __init__(self, text: str):
        super().__init__()
        self.all: list[tuple[str, dict[str, str], list[str]]] = []
        self.open: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.all.append((tag, {name: value or "" for name, value in attrs}, []))
        if tag not in ("input", "img", "link"):
            self.open.append(len(self.all) - 1)

    def handle_endtag(self, tag):
        assert self.all[self.open.pop()][0] == tag, tag  # nothing is left open

    def handle_data(self, data):
        for i in self.open:
            self.all[i][2].append(data)

    def of(self, tag: str) -> list[tuple[dict[str, str], str]]:
        """Attributes and text of the elements of a kind."""
        return [(attrs, "".join(text)) for name, attrs, text in self.all if name == tag]


def raw(page: str) -> Elements:
    """The HTML in a page."""
    fences = [
        token for token in MarkdownIt().parse(page) if token.type == "fence" and token.info == "{raw} html"
    ]
    elements = Elements("\n".join(token.content for token in fences))
    assert elements.open == []
    return elements


def test_the_overview_has_a_card_for_each_and_a_filter_for_each_value():
    named = files(ZOO)
    thumbnails = {
        "attnzoo/softmax": overview.Thumbnail("attnzoo-softmax.png", 'who "influences" whom', (160, 100))
    }
    page = overview.overview(COMPONENTS, named, thumbnails)
    elements = raw(page)
    cards, links = elements.of("li"), elements.of("a")
    assert len(cards) == len(links) == len(COMPONENTS)
    assert {attrs["href"] for attrs, _ in links} == {file.replace(".md", ".html") for file in named.values()}
    values = {
        facet: {one for attrs, _ in cards for one in attrs.get(f"data-{facet}", "").split("|")} - {""}
        for facet in overview.FACETS
    }
    boxes = [attrs for attrs, _ in elements.of("input") if attrs["type"] == "checkbox"]
    filters = {facet: {box["value"] for box in boxes if box["name"] == facet} for facet in overview.FACETS}
    assert filters == {facet: there if len(there) > 1 else set() for facet, there in values.items()}
    by_name = {text.split()[0] if text.split() else "": attrs for attrs, text in elements.of("li")}
    linformer = next(attrs for attrs, text in cards if text.startswith("linformer"))
    assert (linformer["data-kind"], linformer["data-family"], linformer["data-mask"]) == (
        "mechanism",
        "linear",
        "keys",
    )
    assert (linformer["data-growth"], linformer["data-grid"], linformer["data-year"]) == (
        "O(n)",
        "none",
        "2020",
    )
    assert (linformer["data-fidelity"], linformer["data-plugin"]) == ("exact", "attnzoo") and by_name
    ((image, _),) = elements.of("img")
    assert image["alt"] == 'who "influences" whom' and image["loading"] == "lazy" and image["width"] == "160"
    # every field has a label, the count is told
    assert {attrs["for"] for attrs, _ in elements.of("label") if "for" in attrs} == {"zoo-text"}
    assert len(elements.of("label")) == len(boxes) + 1
    assert [attrs["aria-live"] for attrs, _ in elements.of("output")] == ["polite"]
    assert len(elements.of("fieldset")) == len(elements.of("legend")) == sum(map(bool, filters.values()))


def test_the_overview_survives_what_a_card_says(monkeypatch):
    entry = ZOO.mechanisms["softmax"]
    card = replace(entry.value.card, summary='<script>alert("x")</script> ``` & more')
    monkeypatch.setattr(entry.value, "card", card)
    elements = raw(overview.overview([entry], files(ZOO), {}))
    assert card.summary in elements.of("li")[0][1]
    assert [attrs["src"] for attrs, _ in elements.of("script")] == ["overview/overview.js"]


# the folder


def test_a_folder_is_brought_up_to_date(tmp_path):
    there = tmp_path / "made" / "gallery"
    folder.put(there, {"a.md": b"1", "pictures/p.png": b"2"})
    (there / "CNAME").write_text("mine")
    time = (there / "a.md").stat().st_mtime_ns
    folder.put(there, {"a.md": b"1", "sub/b.md": b"3"})
    assert (there / "a.md").stat().st_mtime_ns == time
    held = {file.relative_to(there).as_posix() for file in there.rglob("*")}
    assert held == {"a.md", "sub", "sub/b.md", "CNAME", folder.MARK}
    assert folder.claimed(there) == {"a.md", "sub/b.md"}


def test_what_was_interrupted_is_completed(tmp_path, monkeypatch):
    there = tmp_path / "g"
    folder.put(there, {"a.md": b"1", "b.md": b"2"})
    written, replace_ = [], folder._replace

    def killed(file, content):
        if len(written) == 2:  # the mark, and one page
            raise KeyboardInterrupt
        written.append(file)
        replace_(file, content)

    monkeypatch.setattr(folder, "_replace", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.put(there, {"a.md": b"new", "c.md": b"3"})
    assert (there / "a.md").read_bytes() == b"new" and (there / "b.md").read_bytes() == b"2"
    monkeypatch.setattr(folder, "_replace", replace_)
    folder.put(there, {"c.md": b"3"})
    assert {file.name for file in there.iterdir()} == {"c.md", folder.MARK}


def lay(there: Path, what: str) -> None:
    """Something that is no gallery."""
    if what == "file":
        there.write_text("mine")
        return
    there.mkdir()
    (there / "thesis.md").write_text("mine")
    if what != "other files":
        (there / folder.MARK).write_text(what)


@pytest.mark.parametrize(
    "what", ["other files", "file", "{", '{"a": 1}', '["../thesis.md"]', '["/etc/passwd"]', "[3]"]
)
def test_other_folders_are_refused_and_left(tmp_path, what):
    there = tmp_path / "g"
    lay(there, what)
    for attempt in (
        lambda: folder.put(there, {"thesis.md": b"ours"}),
        lambda: build(there),
        lambda: write(there),
    ):
        with pytest.raises(ZooError) as caught:
            attempt()
        assert caught.value.code == "AZ963"
    assert (there if what == "file" else there / "thesis.md").read_text() == "mine"
    assert not writing.beside(there).exists()


# writing


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """What is drawn, and cached, is made up; the entries that were asked for."""
    asked = []

    def draw_all(there, entries, cache, workers, **how):
        asked.extend(entry.name for entry in entries)
        there.mkdir(parents=True, exist_ok=True)
        return {entry.full_name: drawing(there, entry.name) for entry in entries}

    monkeypatch.setattr(writing, "draw_all", draw_all)
    return asked


def test_sources_hold_pages_pictures_and_overview(tmp_path, drawn):
    there = tmp_path / "zoo"
    written = write(there, only=FEW)
    held = {file.relative_to(there).as_posix() for file in there.rglob("*") if file.is_file()}
    assert sorted(drawn) == ["gated", "linformer", "map_pool"]  # probes and interventions are not
    assert {*written.pages.values(), "index.md", "overview/overview.js", "overview/overview.css"} <= held
    assert "probes/entropy.md" in held and "interventions/temperature.md" in held
    assert "pictures/linformer-flow.png" in held and "overview/attnzoo-linformer.png" in held
    assert written.size == sum((there / name).stat().st_size for name in held if name != folder.MARK)
    assert written.left_out["attnzoo/gated"] == {"maps": "its card names no tap called `weights`"}
    elements = raw((there / "index.md").read_text(encoding="utf-8"))
    for attrs, _ in elements.of("img"):
        with Image.open(there / attrs["src"]) as small:
            assert (small.width // 2, small.height // 2) == (int(attrs["width"]), int(attrs["height"]))
            assert attrs["alt"] and (there / attrs["src"]).stat().st_size < 20_000
    assert len(elements.of("img")) == 3
    # the page of one alone refers to what has no page by name
    alone = write(there, only=["linformer"])
    assert alone.pages == {"attnzoo/linformer": "linformer.md"} and not (there / "gated.md").exists()
    page = (there / "linformer.md").read_text(encoding="utf-8")
    assert "](softmax.md)" not in page and "- `softmax`: " in page


def test_the_sample_plugin_alone(tmp_path, sample, drawn):
    written = write(tmp_path / "zoo", plugin="wavelets")
    assert set(written.pages.values()) == {
        "haar.md", "subband.md", "probes/band_energy.md", "interventions/without_details.md",
    }  # fmt: skip
    page = (tmp_path / "zoo" / "haar.md").read_text(encoding="utf-8")
    assert "name: wavelet_vit" in page and "tests/" not in page and "mallat1989theory" in page
    elements = raw((tmp_path / "zoo" / "index.md").read_text(encoding="utf-8"))
    assert {attrs["data-plugin"] for attrs, _ in elements.of("li")} == {"wavelets"}


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ({"only": ["sofmax"]}, "AZ201"),
        ({"only": ["ham_a"]}, "AZ964"),
        ({"plugin": "nobody"}, "AZ605"),
        ({"only": ["softmax"], "plugin": "wavelets"}, "AZ964"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_written(tmp_path, sample, what, code):
    for make in (write, build):
        with pytest.raises(ZooError) as caught:
            make(tmp_path / "zoo", **what)
        assert caught.value.code == code
    assert list(tmp_path.iterdir()) == []


# the verb


def test_the_verb_says_what_is_missing(tmp_path, monkeypatch):
    from attnzoo.gallery import building

    monkeypatch.setattr(building, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["gallery", "--out", str(tmp_path / "g")])
    assert done.exit_code == 2
    assert "attnzoo gallery needs Sphinx" in done.output and 'pip install "attnzoo[docs]"' in done.output
    assert list(tmp_path.iterdir()) == []


SPHINX = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("sphinx", "myst_parser", "furo", "latex2mathml")),
    reason='Sphinx is not installed: pip install "attnzoo[docs]"',
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The HTML of a few components of the zoo, without pictures."""
    there = tmp_path_factory.mktemp("gallery") / "g"
    names = [name for few in FEW for name in ("--only", few)]
    extra = ["--only", "performer", "--only", "cosformer"]
    done = CliRunner().invoke(
        app, ["gallery", "--out", str(there), "--no-pictures", "--json", *names, *extra]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.output[done.output.index("{") :])
    assert told["warnings"] == [] and len(told["pages"]) == 7
    return there


@SPHINX
@pytest.mark.slow
def test_sphinx_makes_pages_of_them(site):
    for name in ("linformer", "probes/entropy", "index"):
        elements = loose(site / f"{name}.html")
        for tag, attribute in (("a", "href"), ("img", "src"), ("link", "href"), ("script", "src")):
            for attrs, _ in elements.of(tag):
                target = attrs.get(attribute, "#").split("#")[0].split("?")[0]
                assert target.startswith("https://") or (site / name).parent.joinpath(target).exists(), target
    assert loose(site / "linformer.html").of("math")


def loose(file: Path) -> Elements:
    """Of an HTML file; void elements of the theme are not closed."""

    class Loose(Elements):
        def handle_endtag(self, tag):
            while self.open and self.all[self.open.pop()][0] != tag:
                pass

    return Loose(file.read_text(encoding="utf-8"))


@SPHINX
@pytest.mark.slow
def test_a_gallery_is_updated_in_place(site):
    time = (site / "linformer.html").stat().st_mtime_ns
    (site / "CNAME").write_text("mine")
    build(site, only=["linformer", "performer"], pictures=False)
    assert not (site / "gated.html").exists() and (site / "performer.html").exists()
    assert (site / "CNAME").read_text() == "mine"
    build(site, only=[*FEW, "performer", "cosformer"], pictures=False)
    assert (site / "gated.html").exists() and time


@SPHINX
@pytest.mark.slow
def test_the_whole_of_the_sample_plugin(tmp_path):
    """As a user has it: installed, drawn and checked by processes, then again from what was kept."""
    source = ROOT / "plugins" / "attnzoo-wavelets" / "src"
    metadata = tmp_path / "site" / "attnzoo_wavelets-0.1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: attnzoo-wavelets\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text("[attnzoo]\nwavelets = attnzoo_wavelets\n")
    path = os.pathsep.join([str(ROOT), str(source), str(metadata.parent), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        "-m",
        "attnzoo",
        "gallery",
        "--out",
        "g",
        "--plugin",
        "attnzoo-wavelets",
        "--json",
    ]

    def built() -> dict:
        env = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    told = built()
    assert len(told["pages"]) == 4 and told["warnings"] == []
    assert all(name == "wavelets/haar" and set(why) == {"maps"} for name, why in told["left_out"].items())
    page = loose(tmp_path / "g" / "haar.html")
    shown = [attrs["alt"] for attrs, _ in page.of("img")]
    assert shown == ["Data flow of haar", "Who influences whom in haar", "Cost of haar"]
    verdicts = [text for attrs, text in page.of("strong") if text in ("holds", "fails", "not checked")]
    assert verdicts == ["holds", "holds"]  # the law `local`, masks of keys
    kept = {file.name: file.stat().st_ino for file in (tmp_path / "g.cache" / "drawn").glob("*.*")}
    assert len(kept) >= 8 and built()["pages"] == told["pages"]
    assert kept == {file.name: file.stat().st_ino for file in (tmp_path / "g.cache" / "drawn").glob("*.*")}


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SCRIPT = """
<script>
addEventListener("load", () => setTimeout(() => {
  const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
  const at = () => document.activeElement.id || document.activeElement.textContent;
  const shown = () => [...document.querySelectorAll(".zoo-cards > li:not([hidden]) strong")].map((e) => e.textContent);
  const form = document.querySelector(".zoo-filter");
  const count = (value) => form.querySelector(`[value="${value}"]`).parentElement.querySelector("span").textContent;
  const box = (value) => form.querySelector(`[value="${value}"]`).click();
  const said = [];
  const note = (what) => said.push([what, at(), shown(), location.hash, form.querySelector("output").textContent, count("causal")]);
  note("start");
  press("/"); note("slash");
  press("ArrowDown"); press("ArrowRight"); note("right");
  press("End"); note("end");
  press("Home"); press("ArrowUp"); note("up");
  form.elements.text.value = "LINEAR wang"; form.elements.text.dispatchEvent(new Event("input", {bubbles: true})); note("text");
  press("Escape"); setTimeout(() => {
    note("escape");
    box("keys"); box("causal"); note("masks");
    box("linear"); note("family");
    box("probe"); note("nothing");
    const out = document.createElement("pre");
    out.id = "said"; out.textContent = JSON.stringify(said);
    document.body.append(out);
  });
}));
</script>
"""


@SPHINX
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.slow
@pytest.mark.parametrize("fragment", ["", "#text=random&mask=causal", "#fusions"])
def test_the_overview_filters_in_a_browser(site, tmp_path, fragment):
    build(site, only=[*FEW, "performer", "cosformer"], pictures=False)
    text = (site / "index.html").read_text(encoding="utf-8")
    (site / "tried.html").write_text(text.replace("</body>", f"{SCRIPT}</body>"), encoding="utf-8")
    flags = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=5000", "--dump-dom",
    ]  # fmt: skip
    page = f"{(site / 'tried.html').as_uri()}{fragment}"
    dom = subprocess.run([CHROMIUM, *flags, page], capture_output=True, text=True, timeout=120).stdout
    said = {
        what: rest
        for what, *rest in json.loads(html.unescape(re.search(r'id="said">(.*?)</pre>', dom, re.S)[1]))
    }
    everything = ["cosformer", "linformer", "performer", "map_pool", "gated", "entropy", "temperature"]
    if fragment == "#text=random&mask=causal":
        assert said["start"][1:4] == [["performer"], fragment, "1 of 7"]
        return
    assert said["start"][1:] == [everything, fragment, "7 of 7", "2"]
    assert said["slash"][0] == "zoo-text"
    assert said["right"][0] == "linformer" and said["end"][0] == "temperature" and said["up"][0] == "zoo-text"
    assert said["text"][1:4] == [["linformer"], "#text=LINEAR+wang", "1 of 7"]
    assert said["escape"] == ["zoo-text", everything, "", "7 of 7", "2"]
    assert said["masks"][1:4] == [["performer", "gated"], "#mask=keys&mask=causal", "2 of 7"]
    assert said["family"][1:3] == [["performer"], "#family=linear&mask=keys&mask=causal"]
    assert said["nothing"][1:4] == [[], "#kind=probe&family=linear&mask=keys&mask=causal", "0 of 7"]

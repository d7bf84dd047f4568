"""What the site and the gallery have in common: formulas, links, and the pages of the public names. No browser needed."""

import json
import re
import runpy
from importlib import import_module
from pathlib import Path

import pytest

from attnzoo.gallery.links import faults

ROOT = Path(__file__).parent.parent
needs_sphinx = "Sphinx comes with the extra `docs`"


@pytest.fixture(scope="module")
def api():
    """docs/api_pages.py."""
    return runpy.run_path(str(ROOT / "docs" / "api_pages.py"))


def test_links_that_lead_nowhere_are_found(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "good.html").write_text(
        '<h2 id="there">x</h2><a href="sub/bad.html#anchor">x</a><a href="#there">x</a><a href="sub">x</a>'
        '<a href="https://outside.example">a link is not fetched</a><link rel="canonical" href="https://x.example">'
        '<img src="data:image/gif;base64,AA"><a href="good.html?q=1">x</a><a href="a%20b.txt">x</a>'
    )
    (tmp_path / "a b.txt").write_text("")
    (tmp_path / "sub" / "index.html").write_text("")
    (tmp_path / "sub" / "bad.html").write_text(
        '<p id="anchor" style="background: url(//outside.example/a.png)"><a href="none.html">x</a>'
        '<a href="../good.html#nowhere">x</a><img src="https://outside.example/badge.svg" srcset="1.png 1x, 2.png 2x">'
        '<script src="http://outside.example/x.js"></script><a href="/good.html">x</a><a href="../../secret">x</a>'
        '<link rel="stylesheet" href="https://outside.example/font.css">'
    )
    (tmp_path / "style.css").write_text(
        '@import "https://outside.example/more.css"; p { background: url(no.png) }'
    )
    assert faults(tmp_path) == [
        ("style.css", "fetches https://outside.example/more.css from outside"),
        ("style.css", "no.png: no such file"),
        ("sub/bad.html", "../../secret: outside the folder of the pages"),
        ("sub/bad.html", "../good.html#nowhere: no such anchor"),
        ("sub/bad.html", "/good.html: an absolute path, which holds in no other folder"),
        ("sub/bad.html", "1.png: no such file"),
        ("sub/bad.html", "2.png: no such file"),
        ("sub/bad.html", "fetches //outside.example/a.png from outside"),
        ("sub/bad.html", "fetches http://outside.example/x.js from outside"),
        ("sub/bad.html", "fetches https://outside.example/badge.svg from outside"),
        ("sub/bad.html", "fetches https://outside.example/font.css from outside"),
        ("sub/bad.html", "none.html: no such file"),
    ]


def test_formulas_are_mathml_with_their_latex():
    pytest.importorskip("latex2mathml", reason=needs_sphinx)
    from xml.etree import ElementTree

    from attnzoo.gallery.sphinx_settings import mathml

    latex = r"\mathrm{softmax}\left(q k^{\top} / \sqrt{d}\right) v < 1 \& x"
    math = ElementTree.fromstring(mathml(latex, "block"))
    name = "{http://www.w3.org/1998/Math/MathML}"
    assert math.tag == f"{name}math" and math.get("display") == "block"
    (semantics,) = math
    drawn, annotation = semantics
    assert annotation.text == latex and annotation.get("encoding") == "application/x-tex"
    assert "".join(drawn.itertext()).replace(" ", "") == "softmax(qk⊤/d)v<1&x"
    assert drawn.find(f".//{name}msqrt") is not None


@pytest.mark.parametrize(
    ("latex", "fault"),
    [
        (r"\nonsense{x}", r"\nonsense is not known"),
        (r"\frac{1}{2", "braces"),
        ("x_", "Subscript"),
        (r"\left( x", "Extra"),
    ],
)
def test_a_formula_that_is_none_is_refused(latex, fault):
    pytest.importorskip("latex2mathml", reason=needs_sphinx)
    from attnzoo.gallery.sphinx_settings import mathml

    with pytest.raises(ValueError, match=re.escape(fault)):
        mathml(latex, "inline")


def build(folder: Path, pages: dict[str, str]) -> list[str]:
    """Warnings of a small site by the shared settings; its HTML is in `out`."""
    import io

    from sphinx.application import Sphinx

    from attnzoo.gallery.sphinx_settings import settings

    for name, text in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    heard = io.StringIO()
    places = (str(folder), None, str(folder / "out"), str(folder / "doctrees"), "html")
    Sphinx(*places, confoverrides=settings(), status=None, warning=heard).build()
    return re.findall(r"WARNING: (.*)", re.sub(r"\x1b\[[0-9;]*m", "", heard.getvalue()))


def test_a_site_by_the_settings(tmp_path):
    pytest.importorskip("sphinx", reason=needs_sphinx)
    index = "# Zoo\n\n```{toctree}\nreference/index\n```\n\nSee [the folder](reference/), $a^2$ and\n\n$$\n\\sum_i x_i\n$$\n"
    assert (
        build(tmp_path, {"index.md": index, "reference/index.md": "# All\n\n```python\nx = 1\n```\n"}) == []
    )
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert (
        text.count("<math ") == 2
        and "\\sum_i x_i</annotation>" in text
        and 'href="reference/index.html"' in text
    )
    assert 'tabindex="0"' in (tmp_path / "out" / "reference" / "index.html").read_text(encoding="utf-8")


def test_what_is_wrong_on_a_site_is_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason=needs_sphinx)
    text = "# Zoo\n\n[page](none.md), [anchor](#none), $\\nonsense$\n\n<img src='https://x.example/b.svg' alt='b'>\n\n<a href='x'>x</a>"
    warnings = "\n".join(build(tmp_path, {"index.md": text}))
    for said in (
        "target not found: 'none.md'",
        "target not found: 'none'",
        r"formula '\\nonsense': \nonsense is not known",
        "index.html: fetches https://x.example/b.svg from outside",
        "index.html: x: no such file",
    ):
        assert said in warnings, warnings


def test_every_public_name_has_an_entry(api):
    """In what Sphinx is given; tests/test_site.py looks for it on the built pages."""
    recorded = json.loads((ROOT / "tests" / "api_surface.json").read_text(encoding="utf-8"))
    pages = api["pages"]()
    assert set(pages) == {"index", *recorded}
    for module, names in recorded.items():
        assert module in pages["index"]
        entries = re.findall(r"^\.\. (?:auto|py:)\w+:: (\S+)$", pages[module], re.M)
        listed = {entry.removeprefix(f"{module}.") for entry in entries} - {module}
        modules = {name for name in names if f"The module :py:mod:`{module}.{name}`" in pages[module]}
        assert listed | modules == set(names), module
        assert len(entries) == len(set(entries))
        assert not re.findall(r"^\.\. py:.*\n(?:   :.*\n)*\n\s*(?:\n\.\.|$)", pages[module], re.M), (
            module
        )  # says nothing


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("y = |x|, *args, a_ and 2\\n of `x * y_`", "y = \\|x\\|, \\*args, a\\_ and 2\\\\n of ``x * y_``"),
        ("Of `core.Mask`s, S_i and softmax(q kᵀ)", "Of :py:obj:`core.Mask`\\ s, S_i and softmax(q kᵀ)"),
        ("Two\n`words in\ncode`.", "Two\n``words in\ncode``."),
        ("- an item\n  goes on", "- an item\n  goes on"),
        ("As\n\n    x = 1", "As\n\n\n.. code-block:: python\n\n   x = 1\n\n"),
        ("As\n\n    y ∈ | x\n\nend", "As\n\n\n.. code-block:: text\n\n   y ∈ | x\n\nend"),
        ("Args:\n    x: The |x|.", "Args:\n    x: The \\|x\\|."),
        ("```\nx = 1\n```", "\n\n.. code-block:: python\n\n   x = 1\n\n"),
    ],
)
def test_docstrings_are_plain_text(api, text, expected):
    assert api["rst"](text) == expected


def test_every_page_of_docs_has_its_place():
    listed = set(
        re.findall(r"(?:^   |<)/(\S+?)>?$", (ROOT / "docs" / "index.rst").read_text(encoding="utf-8"), re.M)
    )
    pages = {
        str(file.relative_to(ROOT).with_suffix(""))
        for file in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    }
    assert listed == pages | {"docs/api/index", "docs/guides/index", "docs/reference/index"}


def test_the_mirror_is_what_there_is(tmp_path, monkeypatch):
    """Of a small repository: what is copied, what keeps its time, what goes; guides and gallery are left to themselves."""
    pytest.importorskip("sphinx", reason=needs_sphinx)
    monkeypatch.syspath_prepend(ROOT / "docs")
    website = import_module("website")
    root, source = tmp_path / "repository", tmp_path / "source"
    for path in (
        "README.md",
        "docs/index.rst",
        "docs/a.md",
        "docs/b/c.png",
        "docs/guides/01_x.py",
        "docs/reference/y.md",
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)
    (root / "recipes").mkdir()
    (root / "recipes" / "r.yaml").write_text("recipe: 1")
    for name, value in {"ROOT": root, "SOURCE": source, "LINKED": ["recipes"]}.items():
        monkeypatch.setattr(website, name, value)
    monkeypatch.setattr(website, "pages", lambda: {"attnzoo": "attnzoo"})
    website.mirror()
    copied = {str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()}
    assert copied - {"recipes/r.yaml"} == {
        "README.md",
        "index.rst",
        "docs/a.md",
        "docs/b/c.png",
        "docs/api/attnzoo.rst",
    }
    assert (source / "recipes" / "r.yaml").read_text() == "recipe: 1"
    for path in (
        "docs/guides/01_x.rst",
        "docs/guides/02_gone.rst",
        "docs/guides/index.rst",
        "docs/reference/made.md",
    ):
        (source / path).parent.mkdir(exist_ok=True)
        (source / path).write_text(path)
    before = (source / "README.md").stat().st_mtime_ns
    (root / "docs" / "a.md").unlink()
    (root / "docs" / "b" / "c.png").write_text("new")
    website.mirror()
    assert (
        not (source / "docs" / "a.md").exists() and not (source / "docs" / "guides" / "02_gone.rst").exists()
    )
    assert (source / "docs" / "guides" / "01_x.rst").exists() and (
        source / "docs" / "reference" / "made.md"
    ).exists()
    assert (source / "docs" / "guides" / "index.rst").exists()
    assert (source / "docs" / "b" / "c.png").read_text() == "new"
    assert (source / "README.md").stat().st_mtime_ns == before
    assert (root / "recipes" / "r.yaml").exists()

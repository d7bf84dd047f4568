"""What the site and `attnzoo gallery` have in common: how Sphinx reads Markdown, shows formulas and looks.

As Sphinx's configuration:

    globals().update(sphinx_settings.settings())      # in a conf.py
    Sphinx(..., confoverrides=sphinx_settings.settings())

Formulas become MathML, which browsers draw themselves, by latex2mathml: no script, no font, nothing from a network.
After a build, what the pages refer to is looked for (`attnzoo/gallery/links.py`), and what is not there is a warning.
"""

from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element, SubElement, tostring
from zlib import crc32

from attnzoo.gallery.links import faults
from attnzoo.version import VERSION

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator

STATIC = Path(__file__).with_name("static")


def settings() -> dict[str, Any]:
    """Values of Sphinx's configuration, by name."""
    return {
        "project": "attnzoo",
        "author": "the authors of attnzoo",
        "version": VERSION,
        "release": VERSION,
        "extensions": ["myst_parser", "attnzoo.gallery.overview", "attnzoo.gallery.sphinx_settings"],
        # dollars are formulas; headings to the third level are anchors under the names that GitHub gives them
        "myst_enable_extensions": ["dollarmath", "amsmath", "html_image"],
        "myst_heading_anchors": 3,
        "html_math_renderer": "mathml",
        "html_theme": "furo",
        "html_title": f"attnzoo {VERSION}",
        "html_static_path": [str(STATIC)],
        "html_css_files": ["attnzoo.css"],
        "html_favicon": str(STATIC / "favicon.svg"),
        "html_copy_source": False,
        "html_show_copyright": False,
        # colours of code whose contrast is enough, on white and on black
        "pygments_style": "a11y-high-contrast-light",
        "pygments_dark_style": "a11y-high-contrast-dark",
    }


def mathml(latex: str, display: str) -> str:
    """A formula as MathML, which carries the LaTeX it was made from.

    Args:
        latex: Without dollars.
        display: `inline` or `block`.

    Raises:
        ValueError: A command that is not known, or braces that do not match.
    """
    from latex2mathml.converter import convert_to_element

    if latex.replace(r"\{", "").count("{") != latex.replace(r"\}", "").count(
        "}"
    ):  # it would be read as if they did
        raise ValueError("braces do not match")
    try:
        math = convert_to_element(latex, display=display)
    except Exception as error:  # latex2mathml has a class for each fault, without a common one
        raise ValueError(f"{type(error).__name__} {error}".strip()) from error
    if unknown := [text for text in math.itertext() if text.startswith("\\") and text[1:].isalpha()]:
        raise ValueError(f"{unknown[0]} is not known")
    for element in math.iter():  # latex2mathml writes signs as references of HTML
        element.text = unescape(element.text or "")
    drawn = list(math)
    semantics = Element("semantics")
    SubElement(semantics, "mrow").extend(drawn)
    SubElement(semantics, "annotation", encoding="application/x-tex").text = latex
    for child in drawn:
        math.remove(child)
    math.append(semantics)
    return tostring(math, encoding="unicode")


def _write(translator: "HTML5Translator", node: "nodes.Element", display: str) -> None:
    """The node's formula on the page; one that cannot be drawn is a warning, and stands there as LaTeX."""
    from docutils.nodes import SkipNode
    from sphinx.util.logging import getLogger

    latex = node.astext().strip()
    try:
        drawn = mathml(latex, display)
    except ValueError as error:
        getLogger(__name__).warning("formula %r: %s", latex, error, location=node)
        drawn = f"<code>{translator.encode(latex)}</code>"
    if display == "inline":
        whole = translator.starttag(node, "span", "", CLASS="math") + f"{drawn}</span>"
    else:  # a long one scrolls, by keys too
        whole = translator.starttag(node, "div", "", CLASS="math", tabindex="0") + f"{drawn}</div>\n"
    translator.body.append(whole)
    raise SkipNode


def _inline(translator: "HTML5Translator", node: "nodes.Element") -> None:
    _write(translator, node, "inline")


def _block(translator: "HTML5Translator", node: "nodes.Element") -> None:
    _write(translator, node, "block")


def _link_folders(app: "Sphinx", doctree: "nodes.document") -> None:
    """A link to a folder is one to its index, as on GitHub."""
    from sphinx.addnodes import pending_xref

    for node in doctree.findall(pending_xref):
        if node["reftype"] == "myst" and node.get("refdomain") is None:
            path, _ = app.env.relfn2path(node["reftarget"], node["refdoc"])
            if f"{path}/index" in app.env.found_docs:
                node.attributes |= {"refdomain": "doc", "reftarget": f"{path}/index", "reftargetid": None}


def _mend_page(app: "Sphinx", page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """The side bar unfolds where the reader is: two hundred names on each of as many pages would be ten megabytes.

    What people need who have no mouse or do not see: levels of the headings in the side bar, code that keys can scroll.
    """
    if whole := context.get("toctree"):
        context["toctree"] = lambda **options: whole(**options | {"collapse": True}).replace(
            'role="heading"', 'role="heading" aria-level="2"'
        )
    context["body"] = context.get("body", "").replace("<pre>", '<pre tabindex="0">')


def _look_for_targets(app: "Sphinx", error: Exception | None) -> None:
    """A warning for each thing that a page refers to and that is not there."""
    from sphinx.util.logging import getLogger

    if error is None and app.builder.format == "html":
        for page, fault in faults(Path(app.outdir)):
            getLogger(__name__).warning("%s: %s", page, fault)


def setup(app: "Sphinx") -> dict[str, Any]:
    """As an extension of Sphinx."""
    app.setup_extension("furo")  # so that its options are known before a theme is looked for
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
    app.connect("doctree-read", _link_folders)
    app.connect("html-page-context", _mend_page, priority=400)  # before the theme
    app.connect("build-finished", _look_for_targets)
    made_by = crc32(Path(__file__).read_bytes())  # another one makes all pages anew
    return {
        "version": VERSION,
        "env_version": made_by,
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }

"""Pictures that guides make without pyplot, as `attnzoo.plot` and findings do, for sphinx-gallery.

In Sphinx's configuration, before sphinx-gallery's own:

    sphinx_gallery_conf = {
        "image_scrapers": ("guide_figures.scraper", "matplotlib"),
        "remove_config_comments": True,
        ...
    }
"""

from pathlib import Path
from typing import Any
from weakref import WeakSet

from matplotlib import pyplot
from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst

_seen: WeakSet[Figure] = WeakSet()


def scraper(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """What stands on the page after a block of code: each figure that has a name there for the first time.

    Args:
        block: The block of code.
        block_vars: Its variables, and where its pictures go.
        gallery_conf: sphinx-gallery's configuration.
    """
    named = {id(f): f for f in block_vars["example_globals"].values() if isinstance(f, Figure)}
    new = [figure for figure in named.values() if figure not in _seen]
    _seen.update(new)  # pyplot's too, which are closed after their block
    pyplots = [pyplot.figure(number) for number in pyplot.get_fignums()]
    own = [figure for figure in new if figure not in pyplots]
    pages = []
    for figure, file in zip(own, block_vars["image_path_iterator"], strict=False):
        figure.savefig(file)
        pages.append(figure_rst([Path(file)], gallery_conf["src_dir"], said(figure)))
    return "".join(pages)


def said(figure: Figure) -> str:
    """Its text for those who do not see it: its title, or those of its panels, or what is written first."""
    titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
    written = [text.get_text() for text in figure.texts][:1] + [axes.get_xlabel() for axes in figure.axes]
    return ", ".join(filter(None, titles)) or ", ".join(filter(None, written)) or "a picture"

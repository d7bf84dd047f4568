"""Sphinx's configuration of the site; what `attnzoo gallery` shares is in attnzoo/gallery/sphinx_settings.py."""

import sys
from pathlib import Path

from attnzoo.gallery import sphinx_settings

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

globals().update(sphinx_settings.settings())
extensions = [  # noqa: F821
    *sphinx_settings.settings()["extensions"],
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
    "api_pages",
]
autodoc_member_order = "bysource"
maximum_signature_line_length = 88  # beyond it each parameter has a line
include_patterns = ["index.rst", "*.md", "docs/**"]
exclude_patterns = ["docs/guides/GALLERY_HEADER.rst", "docs/**/*.ipynb"]
sphinx_gallery_conf = {
    "examples_dirs": str(DOCS / "guides"),
    "gallery_dirs": "docs/guides",
    "filename_pattern": r"/\d\d_",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("guide_figures.scraper", "matplotlib"),
    "remove_config_comments": True,
    "default_thumb_file": str(sphinx_settings.STATIC / "favicon.svg"),
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
}
suppress_warnings = [
    "misc.highlighting_failure",  # docs/errors.md shows YAML that is none
    "ref.python",  # a name that several modules offer is the same thing in all of them
]

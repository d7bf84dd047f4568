"""Pages of components for people who look around: what each is, does to a picture, costs and is checked for.

write(folder)      sources for Sphinx
build(folder)      HTML that needs no server; `attnzoo gallery --out folder`
"""

from attnzoo.gallery.building import Built, build
from attnzoo.gallery.writing import Written, write

__all__ = ["Built", "Written", "build", "write"]

"""The gallery as HTML, by Sphinx."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from attnzoo.errors import RunError, ZooError
from attnzoo.gallery.folder import claimed, put
from attnzoo.gallery.writing import Written, beside, chosen, write
from attnzoo.train.lock import held
from attnzoo.zoo import load_zoo

NEEDED = {"sphinx": "Sphinx", "myst_parser": "myst-parser", "furo": "furo", "latex2mathml": "latex2mathml"}
"""What the extra `docs` installs, by the name that is imported."""
CONF = """from attnzoo.gallery import sphinx_settings

globals().update(sphinx_settings.settings())
"""


@dataclass(frozen=True)
class Built:
    """A gallery of HTML.

    Args:
        index: Its first page.
        written: What it holds.
        size: Bytes of all its files.
        warnings: What Sphinx found fault with.
    """

    index: Path
    written: Written
    size: int
    warnings: list[str]


def build(folder: Path, *, report: Callable[[str], None] = lambda line: None, **what: Any) -> Built:
    """Build the gallery of what is installed, a folder of HTML that needs no network and no server.

        attnzoo.gallery.build(Path("gallery"), plugin="attnzoo-wavelets")

    Sources, pictures and Sphinx's own notes are kept beside the folder, in `NAME.cache`, which makes the second
    time fast. The folder is changed only when all is built.

    Args:
        folder: Where: a new one, an empty one, or a gallery.
        report: Is told what is done, a line at a time.
        **what: `only`, `plugin`, `pictures`, `timings` and `workers`, as of `write`.

    Raises:
        ZooError: AZ963, when the folder cannot be a gallery; AZ964, when there is nothing to show; AZ965 without
            Sphinx; AZ966, when Sphinx cannot build; AZ201 and AZ605 for names that there are not.
    """
    claimed(folder)
    chosen(load_zoo(), what.get("only", ()), what.get("plugin"))
    if missing := [name for module, name in NEEDED.items() if find_spec(module) is None]:
        raise _without(missing)
    cache = beside(folder)
    with _alone(cache):
        source, html = cache / "source", cache / "html"
        written = write(source, cache=cache / "drawn", report=report, **what)
        report(f"{len(written.pages)} pages as HTML")
        put(cache / "settings", {"conf.py": CONF.encode()})
        warnings = _html(source, html, cache)
        files = {file.relative_to(html).as_posix(): file for file in html.rglob("*") if file.is_file()}
        put(folder, {name: file for name, file in files.items() if name not in (".buildinfo", "objects.inv")})
    size = sum(file.stat().st_size for file in files.values())
    return Built(folder / "index.html", written, size, warnings)


def _html(source: Path, html: Path, cache: Path) -> list[str]:
    """Let Sphinx build; what is in its folder and is no page any more goes.

    Returns:
        Its warnings.
    """
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    log = StringIO()
    stale = set(html.rglob("*.html"))
    try:
        with patch_docutils(), docutils_namespace():
            app = Sphinx(source, cache / "settings", html, cache / "doctrees", "html", None, None, log)
            app.build()
            pages = {html / app.builder.get_target_uri(name) for name in app.env.found_docs}
    except Exception as error:  # of Sphinx, its theme, its extensions, docutils: they have no class in common
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ZooError(
            "AZ966",
            "Sphinx could not build the gallery",
            why=why,
            help=f"its sources are in `{source}`; what was there before has not been changed",
        ) from error
    kept = {html / name for name in ("search.html", "genindex.html")}
    for file in stale - pages - kept:
        file.unlink()
    plain = re.sub(r"\x1b\[[\d;]*m", "", log.getvalue())
    return [line for line in plain.splitlines() if line]


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Hold the lock of a cache, since Sphinx's notes bear one process at a time."""
    try:
        with held(cache):
            yield
    except RunError as error:
        if error.code not in ("AZ804", "AZ808"):
            raise
        why = "another process builds it" if error.code == "AZ808" else error.diagnostics[0].message
        raise ZooError(
            "AZ963", f"`{cache}` cannot be written to", why=why, help="wait, or name another folder"
        ) from None


def _without(missing: list[str]) -> ZooError:
    return ZooError(
        "AZ965",
        f"attnzoo gallery needs {missing[0]}",
        why=f"not installed: {', '.join(missing)}" if len(missing) > 1 else "",
        help='pip install "attnzoo[docs]"',
    )

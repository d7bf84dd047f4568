"""Whether what HTML pages refer to is there, and whether they fetch anything from outside."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {
    ("script", "src"), ("img", "src"), ("img", "srcset"), ("link", "href"), ("iframe", "src"), ("source", "src"),
    ("source", "srcset"), ("video", "src"), ("video", "poster"), ("audio", "src"), ("object", "data"), ("embed", "src"),
}  # fmt: skip
"""Elements and attributes that a browser follows by itself."""
STATED = {"canonical", "next", "prev", "search", "author", "license"}
"""Kinds of `<link>` that state something and fetch nothing."""


class Page(HTMLParser):
    """The anchors of a page, what it links to, and what it makes a browser fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.fetched: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Notes what the attributes say."""
        of = {name: value for name, value in attributes if value}
        self.anchors |= {of[name] for name in ("id", "name") if name in of}
        stated = STATED & set(of.get("rel", "").split())
        for name, value in of.items():
            if (tag, name) in FETCHED and not stated:
                urls = [part.split()[0] for part in value.split(",")] if name == "srcset" else [value]
                self.fetched |= set(urls)
            elif name == "href":
                self.links.add(value)
            elif name == "style":
                self.fetched |= urls_of_css(value)


def urls_of_css(text: str) -> set[str]:
    """What a style sheet makes a browser fetch."""
    found = re.findall(r"url\(([^)]*)\)|@import\s+['\"]([^'\"]*)", text)
    return {(url or imported).strip("'\" ") for url, imported in found}


def faults(folder: Path) -> list[tuple[str, str]]:
    """What the pages of a folder refer to and is not there.

    Args:
        folder: Of HTML files and what belongs to them.

    Returns:
        The page, relative to the folder, and a sentence; sorted.
    """
    folder = folder.resolve()
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in sorted(folder.rglob("*.html"))}
    found = []
    for file, page in pages.items():
        found += [
            (file, fault)
            for url in page.links | page.fetched
            if (fault := _missing(url, file, folder, pages))
        ]
        found += [(file, f"fetches {url} from outside") for url in page.fetched if _outside(url)]
    for file in folder.rglob("*.css"):
        urls = urls_of_css(file.read_text(encoding="utf-8"))
        found += [(file, f"fetches {url} from outside") for url in urls if _outside(url)]
        found += [(file, fault) for url in urls if (fault := _missing(url, file, folder, pages))]
    return sorted((str(file.relative_to(folder)), fault) for file, fault in found)


def _outside(url: str) -> bool:
    parts = urlsplit(url)
    return bool(parts.netloc) or parts.scheme in ("http", "https")


def _missing(url: str, file: Path, folder: Path, pages: dict[Path, Page]) -> str:
    """What is wrong with an address on a page; empty for what is there, and for what lies outside."""
    parts = urlsplit(url)
    if parts.scheme or parts.netloc:
        return ""
    if parts.path.startswith("/"):
        return f"{url}: an absolute path, which holds in no other folder"
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    if not target.is_relative_to(folder):
        return f"{url}: outside the folder of the pages"
    target = target / "index.html" if target.is_dir() else target
    if not target.is_file():
        return f"{url}: no such file"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].anchors:
        return f"{url}: no such anchor"
    return ""

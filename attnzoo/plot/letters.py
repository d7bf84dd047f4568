"""Texts that somebody else wrote: in which fonts, how long they are, and what of them fits."""

from bisect import bisect_right
from functools import cache, lru_cache
from typing import Any

from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.ft2font import FT2Font

from attnzoo.plot.palette import DPI, SMALL, points

PLACEHOLDERS = "Last Resort"
"""Fonts of this name have a sign for every letter, and no letters."""


def spelled(text: str) -> tuple[str, dict[str, Any]]:
    """A text in the letters that there are, and how matplotlib writes it: as it is, `$` and `_` are no mathematics.

    Letters that matplotlib's own font lacks come from fonts of the machine. What none has, or is no letter, is a `?`.

        text, how = spelled(name)
        axes.set_title(text, **how)

    Args:
        text: Any.
    """
    families, missing = _fonts(text)
    written = "".join(" " if c.isspace() else "?" if c in missing or not c.isprintable() else c for c in text)
    return written, {"family": list(families), "parse_math": False, "usetex": False}


def unwritten(text: str) -> bool:
    """Whether some letters of a text are in no font."""
    return bool(_fonts(text)[1])


def length(text: str, size: float) -> float:
    """How long a text is, in pixels, as PNG has it: letters of whole pixels; in SVG and PDF it is a little shorter.

    Args:
        text: One line.
        size: Of its letters, in pixels.
    """
    written, how = spelled(text)
    font = FontProperties(family=how["family"], size=points(size))
    return RendererAgg(1, 1, DPI).get_text_width_height_descent(written, font, ismath=False)[0]


def cut(text: str, room: float, size: float) -> str:
    """The text, or as much of it as fits."""
    while text and length(text, size) > room:
        text = text[:-2].rstrip("… ") + "…" if len(text) > 2 else ""
    return text


def wrapped(text: str, room: float, size: float = SMALL) -> list[str]:
    """The text in lines that fit; a word that is longer than a line is broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and length(longer, size) > room:
            lines.append(word)
        else:
            lines[-1] = longer
        while len(lines[-1]) > 1 and length(lines[-1], size) > room:
            whole = lines.pop()
            fits = bisect_right(range(len(whole)), room, key=lambda i: length(whole[:i], size)) - 1
            fits = max(fits, 1)
            lines += [whole[:fits], whole[fits:]]
    return lines


def _fonts(text: str) -> tuple[tuple[str, ...], frozenset[str]]:
    """Fonts that have the letters of a text: matplotlib's own, and others by name; and the letters that none has."""
    return _fonts_of(frozenset(text), tuple(FontProperties().get_family()))


@lru_cache(maxsize=4096)
def _fonts_of(letters: frozenset[str], own: tuple[str, ...]) -> tuple[tuple[str, ...], frozenset[str]]:
    families = [*own]
    left = {c for c in letters if c.isprintable()}
    left -= _letters(fontManager.findfont(FontProperties(family=families)))
    for name, file in _machine() if left else ():
        if found := left & _letters(file):
            families.append(name)
            left -= found
    return tuple(families), frozenset(left)


@cache
def _machine() -> tuple[tuple[str, str], ...]:
    """Name and file of the upright fonts of the machine."""
    upright = {
        font.name: font.fname
        for font in fontManager.ttflist
        if font.style == "normal" and font.weight in (400, "normal", "regular")
    }
    return tuple(sorted((n, f) for n, f in upright.items() if not n.startswith(PLACEHOLDERS)))


@cache
def _letters(file: str) -> frozenset[str]:
    """What a font has; nothing, where it cannot be opened or is made of pixels."""
    try:
        font = FT2Font(file)
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()

"""Letters for sheets: Pillow's own font has English ones only; for others a font of the machine, or plain letters."""

import unicodedata
from functools import cache

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
OTHERS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf",
          "Arial Unicode.ttf")  # fmt: skip
"""Files that Pillow looks for where the machine keeps its fonts."""

_PLAIN = str.maketrans(
    {"¿": "?", "¡": "!", "–": "-", "—": "-", "‘": "'", "ß": "ss", "ø": "o", "æ": "ae", "\n": " "}
)


@cache
def fonts(size: int) -> tuple[Font, ...]:
    """Pillow's own font, then those of `OTHERS` that there are.

    Args:
        size: In pixels.
    """
    found: list[Font] = [ImageFont.load_default(size=size)]
    for name in OTHERS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return tuple(found)


def lettered(text: str, size: int) -> tuple[str, Font]:
    """A text and a font that has all its letters.

    Where there is none, marks are left out (ñ becomes n), and what is still missing becomes a question mark.

    Args:
        text: One line.
        size: In pixels.
    """
    own, *others = fonts(size)
    for font in (own, *others):
        if all(_has(font, letter) for letter in text):
            return text, font
    bare = unicodedata.normalize("NFKD", text.translate(_PLAIN))
    kept = (letter for letter in bare if not unicodedata.combining(letter))
    return "".join(letter if _has(own, letter) else "?" for letter in kept), own


def _has(font: Font, letter: str) -> bool:
    """Whether a font draws a letter as something else than the sign for what it lacks."""
    return letter == " " or _ink(font, letter) != _ink(font, "\uffff")


@cache
def _ink(font: Font, letter: str) -> bytes:
    return bytes(font.getmask(letter))

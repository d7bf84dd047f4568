"""Letters for sheets: Pillow's own font has English ones only; for others a font of the machine, or plain letters."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
OTHERS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "LiberationSans-Regular.ttf",
    "Arial.ttf",
    "arial.ttf",
    "Arial Unicode.ttf",
)
"""Files that Pillow looks for where the machine keeps its fonts."""

_PLAIN = str.maketrans({"¿": "?", "¡": "!", "–": "-", "—": "-", "‘": "'", "ß": "ss", "ø": "o", "æ": "ae"})


@dataclass(frozen=True)
class Lettering:
    """One font for all texts of a sheet.

    Args:
        file: Of a font of the machine; None for Pillow's own.
        plain: Whether no font has all letters: marks are left out (ñ becomes n), what is still missing is a `?`.
    """

    file: str | None
    plain: bool

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Lettering":
        """The first font that has all letters of some texts."""
        letters = set().union(*texts)
        for file in (None, *OTHERS):
            font = _font(file, 12)
            if font is not None and all(_has(font, letter) for letter in letters):
                return cls(file, plain=False)
        return cls(None, plain=True)

    def font(self, size: int) -> Font:
        """The font.

        Args:
            size: In pixels.
        """
        found = _font(self.file, size)
        assert found is not None, "it was found before"
        return found

    def written(self, text: str) -> str:
        """A text in the letters that there are."""
        if not self.plain:
            return text
        bare = unicodedata.normalize("NFKD", text.translate(_PLAIN))
        kept = (letter for letter in bare if not unicodedata.combining(letter))
        return "".join(letter if _has(self.font(12), letter) else "?" for letter in kept)


@cache
def _font(file: str | None, size: int) -> Font | None:
    try:
        return ImageFont.truetype(file, size) if file else ImageFont.load_default(size=size)
    except OSError:
        return None


def _has(font: Font, letter: str) -> bool:
    """Whether a font draws a letter as something else than the sign for what it lacks."""
    return letter.isspace() or _ink(font, letter) != _ink(font, "\uffff")


@cache
def _ink(font: Font, letter: str) -> bytes:
    return bytes(font.getmask(letter))

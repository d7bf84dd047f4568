"""Makes a corpus of short sentence pairs from the catalogues of programs.

    python docs/make_corpus.py /usr/share/locale/fr --out runs/en-fr.tsv
    attnzoo train transformer --data tsv:runs/en-fr.tsv

The folder has gettext's catalogues (`.mo` or `.po`) of one language, as programs install them. What is kept of a
message and its translation:

- one line each, and at most so many words on both sides;
- words: at least three letters on each side, and a translation that differs from the message;
- messages of programs, not lists of names: catalogues called `iso_*` (languages, countries, currencies) are left out;
- one pair for all messages that differ in case, digits and punctuation alone, so that no near copy of a sentence
  that is trained on is tested on.

A `_` or `&` before a letter, which marks the key of a menu, goes. The corpus is not committed: each catalogue is under
the licence of its program.
"""

import argparse
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

from attnzoo.data.parallel import read_corpus
from attnzoo.data.parallel.corpus import Line, clean
from attnzoo.errors import ZooError

KEY = re.compile(r"(?<!\w)[_&](?=\w)")
LETTERS = re.compile(r"[^\W\d_]")


def short_pairs(lines: tuple[Line, ...], words: int = 12, leave: str = "iso_*") -> list[tuple[str, str]]:
    """Messages and translations, in the order of the catalogues.

    Args:
        lines: Of a corpus of catalogues.
        words: Most words of a side.
        leave: Catalogues whose names match are left out.
    """
    found: dict[str, tuple[str, str]] = {}
    for source, target, place in lines:
        if fnmatch(Path(place.rpartition(",")[0]).name, leave):
            continue
        pair = KEY.sub("", clean(source)), KEY.sub("", clean(target))
        if (
            "\n" in source.strip()
            or "\t" in source + target
            or any(len(text.split()) > words or len(LETTERS.findall(text)) < 3 for text in pair)
            or pair[0] == pair[1]
        ):
            continue
        found.setdefault(re.sub(r"[\W\d_]+", " ", pair[0].lower()).strip(), pair)
    return list(found.values())


def main() -> None:
    """Write the corpus, and say how many pairs it has."""
    parser = argparse.ArgumentParser(
        description="A corpus of short sentence pairs from gettext's catalogues."
    )
    parser.add_argument("folder", type=Path, help="catalogues of one language, such as /usr/share/locale/fr")
    parser.add_argument("--words", type=int, default=12, help="most words of a side (default: 12)")
    parser.add_argument("--out", type=Path, required=True, help="the file of pairs, tab-separated")
    asked = parser.parse_args()
    try:
        pairs = short_pairs(read_corpus(f"gettext:{asked.folder}").lines, asked.words)
    except ZooError as error:
        sys.exit(str(error))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text("".join(f"{source}\t{target}\n" for source, target in pairs), encoding="utf-8")
    sys.stdout.write(f"{len(pairs):,} pairs in {asked.out}\n")


if __name__ == "__main__":
    main()

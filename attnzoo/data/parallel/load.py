"""Parallel text, and strings with their answers, by name."""

from pathlib import Path

from attnzoo.data.load import data_folder
from attnzoo.data.pairs import PairData
from attnzoo.data.parallel.aligned import paths_of, read_aligned
from attnzoo.data.parallel.catalogue import read_gettext
from attnzoo.data.parallel.corpus import Corpus, Tokens, prepared
from attnzoo.data.parallel.moses import read_moses, zip_and_pair
from attnzoo.data.parallel.opus import read_opus, release_of
from attnzoo.data.parallel.text import path_of
from attnzoo.data.parallel.tsv import read_tsv
from attnzoo.errors import DataError, did_you_mean

FILES = {"tsv": read_tsv, "aligned": read_aligned, "moses": read_moses, "gettext": read_gettext}
OPUS = ("opus_books", "opus")
STRINGS = ("copy", "reverse", "sort")
PAIRS = (
    *STRINGS,
    "tsv:FILE",
    "aligned:FILE:FILE",
    "moses:FILE.zip:xx-yy",
    "gettext:PATH",
    "opus_books:xx-yy",
    "opus:CORPUS/VERSION:xx-yy",
)
"""The names that `load_pairs` knows; FILE and PATH stand for yours, xx and yy for languages."""


def is_pairs(name: str) -> bool:
    """Whether a data set is one of pairs, by the word before the first colon.

    Args:
        name: As `--data` takes it.
    """
    return name.partition(":")[0] in (*STRINGS, *FILES, *OPUS)


def load_pairs(
    name: str,
    *,
    root: str | Path | None = None,
    download: bool = True,
    tokens: Tokens,
    max_length: int,
    seed: int = 0,
) -> PairData:
    """A data set of pairs.

    Args:
        name: One of `PAIRS`.
        root: Where downloaded data sets lie; the environment's ATTNZOO_DATA, or `~/.cache/attnzoo`, when null.
        download: Whether the network may be asked.
        tokens: How text is cut into tokens; strings of symbols need none.
        max_length: Most tokens of a source and of a target, with beginning and end, at least 3; longer text is cut.
        seed: Of the split, and of what strings are drawn from.

    Raises:
        DataError: AZ701 for an unknown name, AZ712 for one that lacks a part; AZ702 and AZ703 for what is wrong with a
            download; AZ709, AZ710, AZ711 and AZ714 for what is wrong with a file; AZ713 when too little text is left;
            AZ708 when the library for tokens is missing.
    """
    if name.partition(":")[0] in STRINGS:
        from attnzoo.data.sequences.strings import load_strings

        return load_strings(name, seed)
    return prepared(read_corpus(name, root=root, download=download), tokens, max_length, seed)


def read_corpus(name: str, *, root: str | Path | None = None, download: bool = True) -> Corpus:
    """Parallel text as it lies in its files.

    Args:
        name: One of `PAIRS`, strings apart.
        root: As for `load_pairs`.
        download: As for `load_pairs`.

    Raises:
        DataError: as for `load_pairs`.
    """
    check_pairs(name)
    kind = name.partition(":")[0]
    if kind in OPUS:
        return read_opus(name, data_folder(root), download=download)
    return FILES[kind](name)


def check_pairs(name: str) -> None:
    """Refuse a name that `load_pairs` would refuse; nothing is read.

    Args:
        name: As for `load_pairs`.

    Raises:
        DataError: AZ701 for an unknown name, AZ712 for one that lacks a part, AZ715 for wrong options of strings.
    """
    kind, _, rest = name.partition(":")
    if kind in STRINGS:
        from attnzoo.data.sequences.strings import string_options

        string_options(name)
        return
    if kind in OPUS:
        release_of(name)
        return
    if kind in FILES:
        {"aligned": paths_of, "moses": zip_and_pair}.get(kind, lambda name: path_of(rest, name))(name)
        return
    known = ", ".join(f"`{each}`" for each in PAIRS)
    hint = did_you_mean(kind, [each.partition(":")[0] for each in PAIRS])
    raise DataError(
        "AZ701", f"there is no data set `{name}`", help=hint or f"the data sets of pairs are {known}"
    )

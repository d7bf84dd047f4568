"""Tab-separated text: the source, a tab, the target."""

from attnzoo.data.parallel.corpus import Corpus, Line
from attnzoo.data.parallel.text import lines_of, path_of
from attnzoo.errors import DataError, Place


def read_tsv(name: str) -> Corpus:
    """A corpus from a file with a pair per line.

    Columns after the second are ignored (Tatoeba's exports have an attribution there). Quotation marks are text. The
    first line is a pair as any other: a header is not guessed.

    Args:
        name: `tsv:FILE`, in UTF-8.

    Raises:
        DataError: AZ709 when the file cannot be read, AZ711 when it is not UTF-8, AZ712 when the name has no path,
            AZ714 for a line with text and no tab.
    """
    path = path_of(name.partition(":")[2], name)
    lines = []
    for number, text in enumerate(lines_of(path), start=1):
        source, tab, rest = text.partition("\t")
        if text.strip() and not tab:
            raise DataError(
                "AZ714",
                f"line {number} has no tab",
                place=Place(str(path), number, 1, len(text), text),
                why="a line is the source, a tab and the target",
            )
        lines.append(Line(source, rest.partition("\t")[0], f"{path}:{number}"))
    return Corpus(name, ("source", "target"), tuple(lines))

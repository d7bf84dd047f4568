"""From lines of text in two languages to pairs of ids: cleaned, split without leakage, cut into tokens."""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field

from attnzoo.data.chance import step_seeds
from attnzoo.data.pairs import PairData, Pairs, encoded
from attnzoo.data.vocabulary import UNK, Kind, Subwords
from attnzoo.errors import DataError

TEST_SHARE = 0.05


class Line(NamedTuple):
    """A text, its translation, and where they were read.

    Args:
        source: As written.
        target: As written.
        place: Such as `FILE:12`.
    """

    source: str
    target: str
    place: str


@dataclass(frozen=True)
class Corpus:
    """What a file holds, before cleaning.

    Args:
        name: As `--data` takes it.
        languages: Of the sources and of the targets, as the format names them.
        lines: In the order of the file.
        notes: What a person should know about how it was read.
    """

    name: str
    languages: tuple[str, str]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()


class Tokens(BaseModel):
    """How text is cut into tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    use: Kind = Field(default="bpe", description="bpe: byte pairs, nothing is unknown; word: whole words.")
    size: Annotated[int, Field(ge=300, le=1_000_000)] = Field(
        default=8000, description="Most tokens of a vocabulary; 260 of `bpe` are bytes and special ones."
    )
    min_frequency: Annotated[int, Field(ge=1)] = Field(
        default=2, description="How often a token must occur in what is trained on."
    )
    shared: bool = Field(default=True, description="One vocabulary for sources and targets, or one for each.")


def clean(text: str) -> str:
    """A text as it is trained on: Unicode NFC, on one line, without white space around it.

    Args:
        text: Line breaks in it become spaces.
    """
    parts = (part.strip() for part in unicodedata.normalize("NFC", text).splitlines())
    return " ".join(part for part in parts if part)


def cleaned(corpus: Corpus) -> tuple[list[Line], list[str]]:
    """Lines with text on both sides, each pair once, and what was left out.

    Raises:
        DataError: AZ713 when nothing is left.
    """
    lines = [Line(clean(line.source), clean(line.target), line.place) for line in corpus.lines]
    full = [line for line in lines if line.source and line.target]
    # the first stays
    unique = list({(line.source, line.target): line for line in reversed(full)}.values())[::-1]
    notes = []
    if empty := len(lines) - len(full):
        first = next(line.place for line in lines if not (line.source and line.target))
        notes.append(f"{_count(empty, 'pair')} left out because a side is empty, the first at {first}")
    if twice := len(full) - len(unique):
        notes.append(f"{_count(twice, 'pair')} left out because the same pair came before")
    if not unique:
        raise DataError(
            "AZ713",
            f"`{corpus.name}` has no pair of texts",
            why=f"it has {_count(len(lines), 'line')}, none with text on both sides",
        )
    return unique, notes


def split(texts: Sequence[tuple[str, str]], seed: int) -> list[bool]:
    """Which pairs are tested on: a twentieth, at least one; no text of them occurs in a pair to train on.

    Pairs that share a text, on whichever side, stay together. Such groups are tried in an order drawn from the
    seed; one is tested on if it does not make the test side too large.

    Args:
        texts: Source and target of each pair.
        seed: Of the order.

    Returns:
        True for the pairs to test on.

    Raises:
        DataError: AZ713 when all pairs hang together, so that one side would be empty.
    """
    parent: dict[str, str] = {}

    def root(text: str) -> str:
        while parent[text] != text:
            parent[text] = parent[parent[text]]
            text = parent[text]
        return text

    for source, target in texts:
        parent.setdefault(source, source)
        parent.setdefault(target, target)
        parent[root(source)] = root(target)
    groups: dict[str, list[int]] = {}
    for i, (source, _) in enumerate(texts):
        groups.setdefault(root(source), []).append(i)
    members = list(groups.values())
    if len(members) < 2:
        raise DataError(
            "AZ713",
            f"{_count(len(texts), 'pair')} cannot be split into a side to train on and one to test on",
            why="no text may occur on both sides, and each pair shares a text with another one",
            help="add pairs whose texts occur nowhere else",
        )
    wanted = max(1, round(TEST_SHARE * len(texts)))
    order = step_seeds(seed, 0, torch.arange(len(members))).argsort().tolist()
    chosen: list[int] = []
    for group in order:
        if len(chosen) + len(members[group]) <= wanted:
            chosen += members[group]
    test = set(chosen or min((members[group] for group in order), key=len))
    return [i in test for i in range(len(texts))]


def prepared(corpus: Corpus, tokens: Tokens, max_length: int, seed: int) -> PairData:
    """Pairs to train and to test on.

    Args:
        corpus: What was read.
        tokens: How it is cut; the tokenizers see the training side only.
        max_length: Most tokens of a source and of a target, with beginning and end; longer ones are cut and counted.
        seed: Of the split.

    Raises:
        DataError: AZ708 when the library for tokens is missing, AZ713 when too little text is left.
    """
    lines, notes = cleaned(corpus)
    testing = split([line[:2] for line in lines], seed)
    train, test = (
        [line for line, held_out in zip(lines, testing, strict=True) if held_out is side]
        for side in (False, True)
    )
    if tokens.shared:
        source = target = _trained(tokens, (text for line in train for text in line[:2]))
    else:
        source, target = (_trained(tokens, (line[side] for line in train)) for side in (0, 1))
    sides: list[Pairs] = []
    for name, part in (("train", train), ("test", test)):
        pairs, cut = encoded([line[:2] for line in part], source, target, max_length)
        sides.append(pairs)
        if cut:
            notes.append(f"{_count(cut, 'pair')} to {name} on cut to {max_length} tokens on a side")
    for name, ids in (("source", sides[1].sources), ("target", sides[1].targets)):
        unknown, every = sum(row.count(UNK) for row in ids), sum(map(len, ids))
        if unknown:
            notes.append(
                f"{unknown:,} of {_count(every, f'{name} token')} to test on unknown to the vocabulary"
            )
    first = (
        f"{' to '.join(corpus.languages)}: {_count(len(train), 'pair')} to train on, {len(test):,} to test on, chosen"
        f" by seed {seed}; no text is on both sides"
    )
    return PairData(corpus.name, source, target, sides[0], sides[1], (first, *corpus.notes, *notes))


def _trained(tokens: Tokens, lines: Iterable[str]) -> Subwords:
    return Subwords.trained(lines, tokens.use, tokens.size, tokens.min_frequency)


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"

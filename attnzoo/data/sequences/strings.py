"""Random strings and what is to be made of them: the same, reversed, or sorted. The first tasks for a seq2seq model."""

from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_lowercase

import torch

from attnzoo.data.chance import Chance, integers, step_seeds
from attnzoo.data.pairs import PairData, Pairs
from attnzoo.data.sequences.options import check_size, impossible, option, options
from attnzoo.data.sequences.sequence_data import TEST, TRAIN
from attnzoo.data.vocabulary import SPECIALS, Symbols
from attnzoo.errors import DataError, did_you_mean

String = tuple[int, ...]

STRINGS: dict[str, Callable[[String], String]] = {
    "copy": lambda string: string,
    "reverse": lambda string: string[::-1],
    "sort": lambda string: tuple(sorted(string)),
}
"""Task -> the target of a source."""


@dataclass(frozen=True)
class StringOptions:
    """Options of `copy`, `reverse` and `sort`.

    Args:
        symbols: Letters to draw from.
        length: Longest string; the shortest has one letter.
        train: Strings to train on.
        test: Strings to test on.
    """

    symbols: int = option(12, 2, 26)
    length: int = option(20, 1, 512)
    train: int = option(20_000, 1, 1_000_000)
    test: int = option(1_000, 1, 100_000)


def is_strings(name: str) -> bool:
    """Whether `load_strings` knows the task, whatever its options."""
    return name.partition(":")[0] in STRINGS


def string_options(name: str) -> StringOptions:
    """The options in a name.

    Args:
        name: As for `load_strings`.

    Raises:
        DataError: AZ701 for an unknown name, AZ715 for options that are wrong or do not go together.
    """
    task = name.partition(":")[0]
    if task not in STRINGS:
        raise DataError(
            "AZ701",
            f"there is no data set `{name}`",
            help=did_you_mean(task, list(STRINGS)) or "the tasks on strings are `copy`, `reverse` and `sort`",
        )
    o = options(StringOptions, name)
    check_size(name, max(o.train, o.test), o.length)
    _quotas(name, o)
    return o


def load_strings(name: str, seed: int = 0) -> PairData:
    """Draw strings and make their targets.

    Lengths are as even as can be. The strings to test on are drawn first, all different, of each length at most half of
    all there are; the ones to train on, which may repeat, are drawn until they are none of these. So no string is on
    both sides, and where there is a string of some length to test on, there is one to train on.

    Args:
        name: `copy`, `reverse` or `sort`, with options such as `reverse:symbols=12,length=20`.
        seed: What they are drawn from. The three tasks have the same sources.

    Raises:
        DataError: AZ701 for an unknown name, AZ715 for options that are wrong or do not go together.
    """
    task, o = name.partition(":")[0], string_options(name)
    quotas = _quotas(name, o)
    lengths = [length for length, quota in enumerate(quotas, start=1) for _ in range(quota)]
    taken: set[String] = set()
    test = _drawn(seed, TEST, lengths, o.symbols, taken, distinct=True)
    lengths = [1 + i % o.length for i in range(o.train)]
    train = _drawn(seed, TRAIN, lengths, o.symbols, taken, distinct=False)
    vocabulary = Symbols(ascii_lowercase[: o.symbols])
    few = [length for length, quota in enumerate(quotas, start=1) if quota < o.test // o.length]
    note = f"strings of length {max(few, default=0)} or less are few: half of them are tested on"
    one, other = (_paired(side, STRINGS[task], vocabulary) for side in (train, test))
    return PairData(name, vocabulary, vocabulary, one, other, (note,) if few else ())


def _quotas(name: str, o: StringOptions) -> list[int]:
    """How many strings of each length to test on: even shares, what short lengths lack going to longer ones."""
    left, quotas = o.test, []
    for length in range(1, o.length + 1):
        quotas.append(min(o.symbols**length // 2, left // (o.length - length + 1)))
        left -= quotas[-1]
    if left:
        raise impossible(
            name,
            f"{o.test:,} strings to test on are too many",
            why=f"there are {o.test - left:,} when half of the strings of each length are left to train on",
            help=f"test={o.test - left}, or longer strings",
        )
    return quotas


def _drawn(
    seed: int, side: int, lengths: list[int], symbols: int, taken: set[String], *, distinct: bool
) -> list[String]:
    """A string of each length, from 0 to symbols - 1, none in `taken`, to which distinct ones are added.

    A string that is refused is drawn again from the next stream; at most half are, so few rounds do.
    """
    seeds = step_seeds(seed, side, torch.arange(len(lengths)))
    found: list[String] = [()] * len(lengths)
    pending, stream = list(range(len(lengths))), 0
    while pending:
        again = []
        draws = integers(Chance(seeds[pending], stream).uniform(max(lengths)), symbols).tolist()
        for i, draw in zip(pending, draws, strict=True):
            string = tuple(draw[: lengths[i]])
            if string in taken:
                again.append(i)
                continue
            found[i] = string
            if distinct:
                taken.add(string)
        pending, stream = again, stream + 1
    return found


def _paired(strings: list[String], target: Callable[[String], String], vocabulary: Symbols) -> Pairs:
    sources = tuple(tuple(i + len(SPECIALS) for i in string) for string in strings)
    targets = tuple(target(source) for source in sources)
    source_texts, target_texts = (tuple(map(vocabulary.decode, side)) for side in (sources, targets))
    return Pairs(sources, targets, source_texts, target_texts)

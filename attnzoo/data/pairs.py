"""What a data set of sequence pairs is: sentences and their translations, strings and their reversals."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attnzoo.data.vocabulary import BOS, EOS, PAD, Vocabulary


@dataclass(frozen=True)
class Pairs:
    """One side of a data set, in memory.

    Args:
        sources: Ids of each source, without beginning and end.
        targets: Ids of each target, without beginning and end.
        source_texts: Each source as it was written.
        target_texts: Each target as it was written, whole even where its ids were cut: what translations are scored by.
    """

    sources: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[int, ...], ...]
    source_texts: tuple[str, ...]
    target_texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sources)

    @cached_property
    def lengths(self) -> Tensor:
        """int64 (n, 2): tokens of each source and each target, with beginning and end."""
        counts = [(len(s) + 2, len(t) + 2) for s, t in zip(self.sources, self.targets, strict=True)]
        return torch.tensor(counts, dtype=torch.int64).reshape(-1, 2)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Sources and targets, each with beginning and end, padded to the longest of the batch.

        Args:
            indices: int64 (b,), from 0 to len(self) - 1.

        Returns:
            int64 (b n) and int64 (b m). A model is given `target[:, :-1]` and learns `target[:, 1:]`.
        """
        chosen = indices.tolist()
        return padded([self.sources[i] for i in chosen]), padded([self.targets[i] for i in chosen])


@dataclass(frozen=True)
class PairData:
    """Pairs to train and to test on.

    Args:
        name: As `--data` takes it.
        source: Ids and text of the sources.
        target: Ids and text of the targets; may be the same vocabulary.
        train: What is trained on.
        test: What is tested on.
        notes: What a person should know about how it was made.
    """

    name: str
    source: Vocabulary
    target: Vocabulary
    train: Pairs
    test: Pairs
    notes: tuple[str, ...] = ()


def encoded(
    texts: Sequence[tuple[str, str]], source: Vocabulary, target: Vocabulary, max_length: int
) -> tuple[Pairs, int]:
    """Pairs from their texts.

    Args:
        texts: Source and target.
        source: Ids of the sources.
        target: Ids of the targets.
        max_length: Most tokens of a source and of a target, with beginning and end; at least 3.

    Returns:
        The pairs, and how many of them were cut on either side.
    """
    most, cut = max_length - 2, 0
    sources, targets = [], []
    for one, other in texts:
        first, second = source.encode(one), target.encode(other)
        cut += len(first) > most or len(second) > most
        sources.append(tuple(first[:most]))
        targets.append(tuple(second[:most]))
    written = zip(*texts, strict=True) if texts else ((), ())
    source_texts, target_texts = (tuple(side) for side in written)
    return Pairs(tuple(sources), tuple(targets), source_texts, target_texts), cut


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Ids as a tensor: beginning, ids, end, then padding up to the longest.

    Args:
        rows: Ids without beginning and end.

    Returns:
        int64 (b n), n being two more than the longest row.
    """
    longest = max(map(len, rows), default=0)
    filled = [[BOS, *row, EOS, *[PAD] * (longest - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.int64).reshape(len(rows), longest + 2)

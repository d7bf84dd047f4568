"""The tokens of sequences: those that a map is about, and the words of the data."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnzoo.errors import ZooError

if TYPE_CHECKING:
    from attnzoo.lab.points import Leaf
    from attnzoo.lab.subject import Batch, Subject

PAD, BOS, EOS = range(3)
"""What the vocabularies of pairs begin with; sequences alone have no such tokens."""


def crosses(leaf: "Leaf") -> bool:
    """Whether the queries of a leaf are other tokens than its keys.

    Args:
        leaf: It.
    """
    return getattr(leaf.outer, "context_dim", None) is not None


def side_of(leaf: "Leaf") -> int:
    """Which of the inputs the keys of a leaf are: 0 a sequence or source, 1 a target.

    Args:
        leaf: It.
    """
    return int(leaf.site.startswith("decoder") and not crosses(leaf))


def ids_of(leaf: "Leaf", batch: "Batch") -> Tensor:
    """The ids of a leaf's queries, (b n): of the source in an encoder, of the target in a decoder.

    Args:
        leaf: It.
        batch: Of sequences, or of pairs.

    Raises:
        ZooError: AZ927, when they are vectors and no tokens.
    """
    return _tokens(batch.inputs[int(leaf.site.startswith("decoder"))])


def keys_of(leaf: "Leaf", batch: "Batch") -> Tensor:
    """The ids of a leaf's keys, (b m): as `ids_of`, but of the source where a decoder looks there.

    Args:
        leaf: It.
        batch: Of sequences, or of pairs.

    Raises:
        ZooError: AZ927, when they are vectors and no tokens.
    """
    return _tokens(batch.inputs[side_of(leaf)])


def _tokens(ids: Tensor) -> Tensor:
    if ids.is_floating_point():
        raise ZooError(
            "AZ927",
            "sequences of tokens are needed, and these are sequences of vectors",
            help="a data set like `recall` or `switching` has tokens",
        )
    return ids


def exist(subject: "Subject", ids: Tensor) -> Tensor:
    """Which tokens are no padding, (b n).

    Args:
        subject: Whose they are.
        ids: (b n).
    """
    return ids != PAD if subject.kind == "pairs" else torch.ones_like(ids, dtype=torch.bool)


def words_of(subject: "Subject", part: int = 0) -> Tensor:
    """The words that the data show, each once, in order; without padding, beginning and end.

    Args:
        subject: With sequences or pairs.
        part: Which of the inputs: 0 the sequence or source, 1 the target.

    Raises:
        ZooError: AZ927, when they are vectors and no tokens.
    """
    words = torch.cat([_tokens(batch.inputs[part]).unique() for batch in subject.batches]).unique()
    return words[words > EOS] if subject.kind == "pairs" else words


def drawn(words: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Random sequences (count length), all words of a sequence different where there are enough.

    Args:
        words: To draw from, (w,).
        count: How many sequences.
        length: Words of each.
        generator: Of the CPU.
    """
    if length <= len(words):
        chosen = torch.rand(count, len(words), generator=generator).argsort(dim=1)[:, :length]
    else:
        chosen = torch.randint(len(words), (count, length), generator=generator)
    return words[chosen.to(words.device)]

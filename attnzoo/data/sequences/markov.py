"""n-gram Markov chains, a new one in every sequence: what follows must be learnt from the sequence itself (induction).

Chen, Sheen, Wang, Yang, "Unveiling Induction Heads", arXiv:2409.10559. The best predictor is known: `posterior`.
"""

from dataclasses import dataclass
from string import ascii_lowercase

import torch
from torch import Tensor

from attnzoo.data.chance import Chance, step_seeds
from attnzoo.data.sequences.options import check_size, impossible, option, options
from attnzoo.data.sequences.sequence_data import IGNORE, TEST, TRAIN, InMemory, SequenceData

MOST_GRAMS = 4096
"""Transitions that a chain may have, symbols ** order."""
CHUNK = 2**24  # counts held at once


@dataclass(frozen=True)
class MarkovOptions:
    """Options of `markov`.

    Args:
        symbols: Tokens, S.
        order: n; a symbol depends on the n - 1 before it, its parents.
        length: Tokens that the model sees, L.
        alpha: Of the Dirichlet distribution that the chain's rows are drawn from; small makes them near certain.
        every: Whether every symbol with n - 1 parents is asked, or only the one after the last, as in the paper.
        train: Sequences to train on.
        test: Sequences to test on.
    """

    symbols: int = option(3, 2, 26)
    order: int = option(2, 2, 6)
    length: int = option(64, 2, 4096)
    alpha: float = option(0.3, 0.001, 1000)
    every: bool = option(True)
    train: int = option(10_000, 1, 1_000_000)
    test: int = option(2_000, 1, 100_000)


def markov_options(name: str) -> MarkovOptions:
    """The options in a name.

    Args:
        name: As for `load_markov`.

    Raises:
        DataError: AZ715 for options that are wrong or do not go together.
    """
    o = options(MarkovOptions, name)
    if o.symbols**o.order > MOST_GRAMS:
        raise impossible(
            name,
            f"{o.symbols} symbols of order {o.order} make {o.symbols**o.order:,} transitions",
            why=f"at most {MOST_GRAMS:,} can be met often enough to be learnt from a sequence",
            help="fewer symbols, or a lower order",
        )
    if o.length < o.order:
        raise impossible(
            name, f"{o.length} tokens are too few for order {o.order}", help=f"length={4 * o.order} or more"
        )
    check_size(name, max(o.train, o.test), o.length)
    return o


def load_markov(name: str, seed: int) -> SequenceData:
    """Draw them.

    In the paper a sequence has a chain π of its own, each of its S^(n-1) rows drawn from Dirichlet(α), the first n - 1
    symbols are uniform, and the others follow π. We draw the same distribution without π: given the past, the next
    symbol is s with probability (α + N(s)) / (S α + Σ N), where N counts what followed the same parents before
    (Pólya's urn).

    Asking everywhere is the default: it gives as many questions per sequence as it has symbols, early ones that are
    easy to learn the mechanism from among them, at no cost to the model.

    Args:
        name: `markov`, with options such as `markov:symbols=3,order=3,length=100,every=false`.
        seed: What they are drawn from.

    Raises:
        DataError: AZ715 for options that are wrong or do not go together.
    """
    o = markov_options(name)
    train, test = (_side(seed, side, count, o) for side, count in ((TRAIN, o.train), (TEST, o.test)))
    words = tuple(ascii_lowercase[: o.symbols])
    return SequenceData(
        name, o.symbols, None, o.symbols, False, o.length, train, test, words=words, causal=o.every
    )


def posterior(tokens: Tensor, symbols: int, order: int, alpha: float) -> Tensor:
    """The probability of each next symbol given all before, for one who knows how sequences are drawn.

    By the Dirichlet prior the row of the present parents is, given the past, Dirichlet(α + N) with N what followed them
    before; its mean is (α + N) / (S α + Σ N). No predictor has a smaller expected log-loss.

    Args:
        tokens: int64 (b n).
        symbols: S.
        order: n; the first n - 2 positions, which have too few parents, get 1 / S, for these symbols are uniform.
        alpha: Of the prior.

    Returns:
        float64 (b n S).
    """
    b, n = tokens.shape
    context, first = _contexts(tokens, symbols, order), order - 2
    same = context[:, :, None] == context[:, None, :]  # (b t u): parents at t and at u alike
    before = torch.ones(n, n, dtype=torch.bool).tril(-1)  # what followed u < t is known at t
    before[:, :first] = False
    followers = torch.nn.functional.one_hot(tokens.roll(-1, dims=1), symbols).double()
    counts = (same & before).double() @ followers  # (b n S)
    return (alpha + counts) / (symbols * alpha + counts.sum(dim=-1, keepdim=True))


def _contexts(tokens: Tensor, symbols: int, order: int) -> Tensor:
    """int64 (b n): a number for the last n - 1 tokens up to each position; before position n - 2 it means nothing."""
    return sum(
        (tokens.roll(lag, dims=1) * symbols**lag for lag in range(order - 1)), torch.zeros_like(tokens)
    )


def _side(seed: int, side: int, count: int, o: MarkovOptions) -> InMemory:
    seeds = step_seeds(seed, side, torch.arange(count))
    tokens = torch.cat([_chains(chunk, o) for chunk in seeds.split(max(1, CHUNK // o.symbols**o.order))])
    targets = tokens[:, 1:].clone()
    targets[:, : o.order - 2 if o.every else o.length - 1] = IGNORE
    return InMemory(tokens[:, :-1].contiguous(), targets)


def _chains(seeds: Tensor, o: MarkovOptions) -> Tensor:
    """int64 (b, L + 1)."""
    b, rows, parents = len(seeds), torch.arange(len(seeds)), o.order - 1
    uniform = Chance(seeds).uniform(o.length + 1).double()
    tokens = (uniform * o.symbols).long()  # right for the first ones; the others are overwritten
    counts = torch.zeros(b, o.symbols**parents, o.symbols, dtype=torch.float64)
    place = o.symbols ** torch.arange(parents)
    for t in range(parents, o.length + 1):
        context = (tokens[:, t - parents : t] * place).sum(dim=1)
        shares = (o.alpha + counts[rows, context]).cumsum(dim=1)  # (b S)
        tokens[:, t] = (uniform[:, t, None] * shares[:, -1:] >= shares[:, :-1]).sum(dim=1)
        counts[rows, context, tokens[:, t]] += 1
    return tokens

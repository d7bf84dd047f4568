"""Multi-query associative recall (MQAR): keys with values, then some keys again; what was the value?

Arora et al., "Zoology", arXiv:2312.04927, §3 and appendix. It tells apart models that look up a token by its content
from models that only mix along fixed distances.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.data.chance import Chance, integers, step_seeds
from attnzoo.data.sequences.options import check_size, impossible, option, options
from attnzoo.data.sequences.sequence_data import IGNORE, TEST, TRAIN, InMemory, SequenceData

CHUNK = 2**22  # tokens laid out at once


@dataclass(frozen=True)
class RecallOptions:
    """Options of `recall`.

    Args:
        pairs: Keys and values per sequence, n.
        length: Tokens per sequence, L; even, at least 4 n, or 2 n more for each further pass.
        vocab: Number of tokens, V; greater than L.
        power: The exponent a of the gaps; 1 makes them uniform.
        noise: Whether random tokens stand between the queries, instead of token 0.
        passes: How often the list of keys and values stands there before the queries.
        train: Sequences to train on.
        test: Sequences to test on.
    """

    pairs: int = option(4, 1, 512)
    length: int = option(32, 4, 8192)
    vocab: int = option(64, 6, 65_536)
    power: float = option(0.01, 0, 1)
    noise: bool = option(False)
    passes: int = option(1, 1, 512)
    train: int = option(20_000, 1, 1_000_000)
    test: int = option(2_000, 1, 100_000)


def recall_options(name: str) -> RecallOptions:
    """The options in a name.

    Args:
        name: As for `load_recall`.

    Raises:
        DataError: AZ715 for options that are wrong or do not go together.
    """
    o = options(RecallOptions, name)
    if o.length % 2:
        raise impossible(name, f"the length {o.length} is odd", help=f"length={o.length + 1}")
    tokens = 2 + 2 * o.passes  # of a pair
    if tokens * o.pairs > o.length:
        fewer = f", or pairs={o.length // tokens} or fewer" if o.length >= tokens else ""
        raise impossible(
            name,
            f"{o.pairs} pairs do not fit into {o.length} tokens",
            why="a pair takes two tokens in each pass, and a slot of two for its query",
            help=f"length={tokens * o.pairs} or more{fewer}",
        )
    if o.vocab <= o.length:
        raise impossible(
            name,
            f"a vocabulary of {o.vocab} is too small for {o.length} tokens",
            why="keys and values of a sequence are all different; the paper asks for more tokens than positions",
            help=f"vocab={2 * o.length}",
        )
    check_size(name, max(o.train, o.test), o.length)
    return o


def load_recall(name: str, seed: int) -> SequenceData:
    """Draw them.

    n keys, all different, from 1 to V/2 - 1, and n values, all different, from V/2 to V - 1, are drawn uniformly. The
    sequence begins k₁ v₁ k₂ v₂ …, `passes` times the same; after these C = 2 n `passes` tokens are G = (L - C) / 2
    slots of two. Slots g_i are drawn without replacement with p(g) ∝ (g + 1)^(a - 1); key i stands again at C + 2 g_i,
    where its value is asked. Everything else is token 0.

    Args:
        name: `recall`, with options such as `recall:pairs=8,length=64,vocab=128`.
        seed: What they are drawn from.

    Raises:
        DataError: AZ715 for options that are wrong or do not go together.
    """
    o = recall_options(name)
    train, test = (_side(seed, side, count, o) for side, count in ((TRAIN, o.train), (TEST, o.test)))
    half = o.vocab // 2
    words = ("·", *(f"k{i}" for i in range(1, half)), *(f"v{i}" for i in range(half, o.vocab)))
    return SequenceData(name, o.vocab, None, o.vocab, False, o.length, train, test, words=words)


def laid_out(
    keys: Tensor, values: Tensor, gaps: Tensor, fillers: Tensor, passes: int = 1
) -> tuple[Tensor, Tensor]:
    """Sequences from their parts.

    Args:
        keys: int64 (b n).
        values: int64 (b n).
        gaps: int64 (b n), the slot of each key's query.
        fillers: int64 (b L), what stands where nothing else does.
        passes: How often keys and values stand there.

    Returns:
        Inputs and targets, int64 (b L).
    """
    context = 2 * keys.shape[1] * passes
    inputs, targets = fillers.clone(), torch.full_like(fillers, IGNORE)
    inputs[:, 0:context:2], inputs[:, 1:context:2] = keys.repeat(1, passes), values.repeat(1, passes)
    inputs.scatter_(1, context + 2 * gaps, keys)
    targets.scatter_(1, context + 2 * gaps, values)
    return inputs, targets


def _side(seed: int, side: int, count: int, o: RecallOptions) -> InMemory:
    seeds = step_seeds(seed, side, torch.arange(count))
    parts = [_chunk(chunk, o) for chunk in seeds.split(max(1, CHUNK // o.length))]
    return InMemory(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _chunk(seeds: Tensor, o: RecallOptions) -> tuple[Tensor, Tensor]:
    chance, half = Chance(seeds), o.vocab // 2
    keys = 1 + distinct(chance.uniform(o.pairs), half - 1)
    values = half + distinct(chance.uniform(o.pairs), o.vocab - half)
    slots = (o.length - 2 * o.pairs * o.passes) // 2
    # Whoever arrives first when arrivals are exponential with rates p: drawing without replacement by p.
    rates = torch.arange(1, slots + 1) ** (o.power - 1)
    arrivals = -torch.log1p(-chance.uniform(slots)) / rates
    gaps = arrivals.argsort(dim=1, stable=True)[:, : o.pairs]
    if o.noise:
        fillers = integers(chance.uniform(o.length), o.vocab)
    else:
        fillers = torch.zeros(len(seeds), o.length, dtype=torch.int64)
    return laid_out(keys, values, gaps, fillers, o.passes)


def distinct(uniform: Tensor, count: int) -> Tensor:
    """Whole numbers from 0 to count - 1, in each row all different: the first ones of a shuffle.

    Step i of Fisher and Yates swaps place i with itself or a later one; only the n swaps are kept, not the places.

    Args:
        uniform: float (b n), in [0, 1).
        count: At most 2¹⁶, at least n.

    Returns:
        int64 (b n).
    """
    b, n = uniform.shape
    places, moved, found = (torch.zeros(b, n, dtype=torch.int64) for _ in range(3))

    def held(place: Tensor, i: int) -> Tensor:
        """What a place (b,) holds after i swaps: what the last swap there put, or its own number."""
        swaps = torch.arange(1, i + 1)
        last = ((places[:, :i] == place[:, None]) * swaps).amax(dim=1) if i else torch.zeros_like(place)
        return torch.where(last > 0, moved.gather(1, (last - 1).clamp(min=0)[:, None])[:, 0], place)

    for i in range(n):
        place = i + integers(uniform[:, i], count - i)
        found[:, i], moved[:, i] = held(place, i), held(torch.full((b,), i), i)
        places[:, i] = place
    return found

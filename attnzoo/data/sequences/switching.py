"""Task switching (IARC): a stream of symbols whose rule changes at control tokens; what comes next?

Gros, "Small transformer architectures for task switching", arXiv:2508.04461. The paper's text gives I; A, R and C are
our interpretation of its names.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.data.chance import Chance, integers, step_seeds
from attnzoo.data.sequences.options import check_size, option, options
from attnzoo.data.sequences.sequence_data import IGNORE, TEST, TRAIN, InMemory, SequenceData

RULES = ("I", "A", "R", "C")
"""Increment, addition, reverse copy, context; the control tokens in the order of their ids, after the symbols."""
START = 2
"""The stream begins with this many random symbols."""


@dataclass(frozen=True)
class SwitchingOptions:
    """Options of `switching`.

    Args:
        symbols: Symbols, N; they are added modulo N.
        length: Tokens that the model sees.
        switch: Probability of a control token after a symbol.
        train: Sequences to train on.
        test: Sequences to test on.
    """

    symbols: int = option(16, 2, 256)
    length: int = option(64, 4, 4096)
    switch: float = option(0.15, 0, 1)
    train: int = option(10_000, 1, 1_000_000)
    test: int = option(2_000, 1, 100_000)


def switching_options(name: str) -> SwitchingOptions:
    """The options in a name.

    Args:
        name: As for `load_switching`.

    Raises:
        DataError: AZ715 for options that are wrong or do not go together.
    """
    o = options(SwitchingOptions, name)
    check_size(name, max(o.train, o.test), o.length)
    return o


def load_switching(name: str, seed: int) -> SequenceData:
    """Draw them.

    A stream is two random symbols, a control token, and then symbols and now and then a control token, never two in a
    row. Controls are uniform among the four and set the rule until the next one. With x₋₁ and x₋₂ the last two
    symbols of the stream, control tokens skipped, the next symbol is

        I   x₋₁ + 1 (the paper's equation 1)
        A   x₋₁ + x₋₂
        R   the symbols between the last two control tokens, backwards; when all are said, a control token follows
        C   x₋₁ + c, where c is the symbol before the control token

    modulo N. The next token is asked wherever it is a symbol that the rule gives: not the first ones, and no control
    tokens, which nobody can foresee. Each question's kind is its rule's position in `RULES`.

    Args:
        name: `switching`, with options such as `switching:length=128,switch=0.1`.
        seed: What they are drawn from.

    Raises:
        DataError: AZ715 for options that are wrong.
    """
    o = switching_options(name)
    train, test = (_side(seed, side, count, o) for side, count in ((TRAIN, o.train), (TEST, o.test)))
    words = (*map(str, range(o.symbols)), *RULES)
    notes = ("the rules A, R and C are our interpretation; the paper's text gives only I",)
    tokens = o.symbols + len(RULES)
    return SequenceData(
        name, tokens, None, tokens, False, o.length, train, test, notes, words=words, kinds=RULES, causal=True
    )


def streams(uniform: Tensor, symbols: int, switch: float) -> tuple[Tensor, Tensor]:
    """Streams from uniform numbers.

    Args:
        uniform: float (b n 2): whether a control token comes, and what the token is where that is random.
        symbols: N.
        switch: Probability of a control token after a symbol.

    Returns:
        Tokens int64 (b n), and int64 (b n): the rule that gave each token, -1 where none did.
    """
    b, n, rows = *uniform.shape[:2], torch.arange(len(uniform))
    tokens = integers(uniform[..., 1], symbols)  # right for the first ones; the others are overwritten
    kinds = torch.full((b, n), -1)
    controls = symbols + integers(uniform[..., 1], len(RULES))
    last, before = tokens[:, START - 1], tokens[:, START - 2]  # x₋₁ and x₋₂
    begin = torch.zeros(b, dtype=torch.int64)  # where the segment before the last control token begins
    at = torch.full((b,), START)  # where that token stands
    rule, addend = torch.zeros_like(at), torch.zeros_like(at)
    for t in range(START, n):
        back = 2 * at - t  # where R reads: as far before its control token as t is behind it
        over = (rule == 2) & (back < begin)
        control = (uniform[:, t, 0] < switch) & (at < t - 1) | over if t > START else torch.ones_like(over)
        chosen = (last + 1, last + before, tokens[rows, back.clamp(min=0)], last + addend)
        symbol = torch.stack(chosen)[rule, rows] % symbols
        tokens[:, t] = torch.where(control, controls[:, t], symbol)
        kinds[:, t] = torch.where(control, -1, rule)
        begin = torch.where(control & (t > START), at + 1, begin)
        at = torch.where(control, t, at)
        rule = torch.where(control, controls[:, t] - symbols, rule)
        addend = torch.where(control, last, addend)
        before, last = torch.where(control, before, last), torch.where(control, last, symbol)
    return tokens, kinds


def _side(seed: int, side: int, count: int, o: SwitchingOptions) -> InMemory:
    chance = Chance(step_seeds(seed, side, torch.arange(count)))
    uniform = chance.uniform(2 * (o.length + 1)).view(count, o.length + 1, 2)
    tokens, kinds = streams(uniform, o.symbols, o.switch)
    asked = kinds[:, 1:] >= 0
    return InMemory(
        tokens[:, :-1].contiguous(), tokens[:, 1:].where(asked, IGNORE), kinds[:, 1:].contiguous()
    )

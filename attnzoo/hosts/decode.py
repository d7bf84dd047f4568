"""Target sequences out of a model: greedy search and beam search.

The score of a hypothesis is log P(y | x), summed over its tokens, the end among them. Padding and beginning are never
chosen; the probabilities are the model's own all the same, with nothing redistributed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.hosts.seq2seq import Memory, Seq2Seq

NEVER = float("-inf")


@dataclass(frozen=True)
class Hypothesis:
    """A target sequence that a search found.

    Args:
        tokens: Ids, without beginning and end.
        score: log P(y | x), in nats; with the end's if it ended.
        ended: Whether it ended by itself; otherwise it was cut at the greatest length.
    """

    tokens: list[int]
    score: float
    ended: bool

    def rank(self, length_penalty: float) -> float:
        """What hypotheses of different length are compared by: log P(y | x) / ((5 + |y|) / 6)^α, |y| with the end.

        Wu et al., "Google's Neural Machine Translation System", 2016, arXiv:1609.08144, §7, eq. 14, without coverage.

        Args:
            length_penalty: α; 0 compares probabilities, more favours long hypotheses.
        """
        return self.score / _penalty(len(self.tokens) + self.ended, length_penalty)


@dataclass(frozen=True)
class Decoded:
    """What was found for each source of a batch.

    Args:
        hypotheses: Of each source, the best first.
    """

    hypotheses: list[list[Hypothesis]]

    @property
    def best(self) -> list[Hypothesis]:
        """The best of each source."""
        return [found[0] for found in self.hypotheses]

    @property
    def tokens(self) -> list[list[int]]:
        """Ids of the best of each source, without beginning and end."""
        return [one.tokens for one in self.best]

    @property
    def scores(self) -> list[float]:
        """log P(y | x) of the best of each source, in nats."""
        return [one.score for one in self.best]

    @property
    def ended(self) -> list[bool]:
        """Whether the best of each source ended by itself."""
        return [one.ended for one in self.best]


@torch.no_grad()
def greedy(model: Seq2Seq, source: Tensor, max_length: int, *, cached: bool = True) -> Decoded:
    """The most probable token, and given it the most probable next, until the end.

    Args:
        model: Is left in the modes it was in.
        source: Ids (b n), padded with 0, on the model's device.
        max_length: Most tokens, the end among them; not more than the model was built for.
        cached: Whether what is kept of the tokens before is used; otherwise each step computes all anew.

    Raises:
        LayoutMismatch: AZ407, when a source is longer than the model was built for.
    """
    steps = max(0, min(max_length, model.max_length))
    tokens = source.new_full((len(source), steps), model.eos)
    with _evaluating(model):
        decoder = _Decoder(model, model.encode(source), cached)
        scores = torch.zeros(len(source), dtype=decoder.exact, device=source.device)
        newest = source.new_full((len(source),), model.bos)
        of = torch.arange(len(source), device=source.device)  # the source of each row
        running = torch.ones_like(of, dtype=torch.bool)
        for step in range(steps if len(source) else 0):
            gained = decoder.next(newest)
            newest = gained.argmax(dim=-1)
            gained = gained.gather(1, newest[:, None])[:, 0]
            scores[of] += torch.where(running, gained, 0.0)
            tokens[of, step] = torch.where(running, newest, model.eos)
            running &= newest != model.eos
            left = int(running.sum())
            if not left:
                break
            if 2 * left <= len(running):  # so that what is kept is copied seldom
                rows = running.nonzero()[:, 0]
                decoder.select(rows)
                newest, of, running = newest[rows], of[rows], running[rows]
    found = []
    for row, score in zip(tokens.tolist(), scores.tolist(), strict=True):
        ended = model.eos in row
        found.append([Hypothesis(row[: row.index(model.eos)] if ended else row, score, ended)])
    return Decoded(found)


@torch.no_grad()
def beam(
    model: Seq2Seq,
    source: Tensor,
    max_length: int,
    beams: int = 4,
    length_penalty: float = 0.6,
    *,
    cached: bool = True,
    every: bool = False,
) -> Decoded:
    """The best of several hypotheses that are followed at once.

    Each step continues the hypotheses under way by every token and goes on with the most probable. One that ends keeps
    its place and is compared at last, so with one place this is greedy search; among those that ended, the one of the
    highest `Hypothesis.rank` wins, and any of them wins over one that was cut. A search is given up early only if no
    hypothesis under way can still win, which is certain where log P / ((5 + |y|) / 6)^α at its greatest is too low.

    Args:
        model: Is left in the modes it was in.
        source: Ids (b n), padded with 0, on the model's device.
        max_length: Most tokens, the end among them; not more than the model was built for.
        beams: Places for hypotheses, of each source.
        length_penalty: α of `Hypothesis.rank`.
        cached: Whether what is kept of the tokens before is used; otherwise each step computes all anew.
        every: Whether hypotheses that cannot win are followed to their end too.

    Raises:
        LayoutMismatch: AZ407, when a source is longer than the model was built for.
    """
    steps = max(0, min(max_length, model.max_length))
    found: list[list[Hypothesis]] = [[] for _ in source]
    with _evaluating(model):
        decoder = _Decoder(model, model.encode(source), cached)
        of = torch.arange(len(source), device=source.device)  # the source of each block of rows
        room = torch.full_like(of, beams)  # places that are not taken by those that ended
        tokens = source.new_empty(len(source), 1, 0)  # (b k t)
        newest = source.new_full((len(source), 1), model.bos)
        # (b k); -∞ for no hypothesis
        scores = torch.zeros(len(source), 1, dtype=decoder.exact, device=source.device)
        for step in range(1, steps + 1 if len(source) else 1):
            gained = decoder.next(newest.flatten())
            vocabulary, width = gained.shape[-1], scores.shape[1]
            totals = (scores[..., None] + gained.unflatten(0, (-1, width))).flatten(1)  # (b kv)
            scores, at = totals.topk(min(beams, totals.shape[1]))
            parents, newest = at // vocabulary, at % vocabulary
            places = torch.arange(scores.shape[1], device=scores.device)
            scores = scores.masked_fill(places >= room[:, None], NEVER)
            ends = (newest == model.eos) & (scores > NEVER)
            for block, place in ends.nonzero().tolist():
                ids = tokens[block, parents[block, place]].tolist()
                found[of[block]].append(Hypothesis(ids, scores[block, place].item(), ended=True))
            room = room - ends.sum(dim=1)
            scores = scores.masked_fill(ends, NEVER)

            done = ~(scores.amax(dim=1) > NEVER)
            if not every:
                # a score only falls, so its rank is at most that of the same score at the kindest length
                kindest = max(_penalty(step + 1, length_penalty), _penalty(steps, length_penalty))
                reached = [
                    max((one.rank(length_penalty) for one in found[i]), default=NEVER) for i in of.tolist()
                ]
                done |= scores.amax(dim=1) / kindest <= scores.new_tensor(reached)
                scores = scores.masked_fill(done[:, None], NEVER)
            left = int((~done).sum())
            if not left:
                break
            blocks = torch.arange(len(of), device=of.device)
            if 2 * left <= len(of):  # so that what is kept for cross-attention is copied seldom
                blocks = (~done).nonzero()[:, 0]
            alive = int((scores > NEVER).sum(dim=1).amax())
            scores, order = scores[blocks].topk(alive)  # (b k), those under way first
            parents, newest = parents[blocks].gather(1, order), newest[blocks].gather(1, order)
            decoder.select(
                (blocks[:, None] * width + parents).flatten(),
                same_sources=alive == width and len(blocks) == len(of),
            )
            of, room = of[blocks], room[blocks]
            tokens = torch.cat([tokens[blocks[:, None], parents], newest[..., None]], dim=-1)
        else:
            for block, place in (scores > NEVER).nonzero().tolist():
                one = Hypothesis(tokens[block, place].tolist(), scores[block, place].item(), ended=False)
                found[of[block]].append(one)
    found = [each or [Hypothesis([], NEVER, ended=False)] for each in found]  # a model that gives no numbers
    return Decoded(
        [sorted(each, key=lambda one: (not one.ended, -one.rank(length_penalty))) for each in found]
    )


def _penalty(length: int, alpha: float) -> float:
    return ((5 + length) / 6) ** alpha


class _Decoder:
    """Log probabilities of the next tokens, by the model's `step` or by its `decode` of all tokens so far.

    Args:
        model: In eval mode.
        memory: What it made of the sources.
        cached: Whether by `step`.
    """

    def __init__(self, model: Seq2Seq, memory: Memory, cached: bool):
        self.model, self.memory = model, memory
        self.exact = torch.promote_types(memory.tokens.dtype, torch.float32)
        self.state = model.start(memory) if cached else None
        self.tokens: Tensor | None = None  # (b m); the state has its own

    def next(self, newest: Tensor) -> Tensor:
        """Log probabilities (b v) of the token after the newest (b,), in float32 or better; -∞ for what is no token."""
        newest = newest[:, None]
        if self.state is not None:
            logits = self.model.step(newest, self.state)[:, -1]
        else:
            so_far = newest if self.tokens is None else torch.cat([self.tokens, newest], dim=1)
            self.tokens, logits = so_far, self.model.decode(so_far, self.memory)[:, -1]
        gained = logits.to(self.exact).log_softmax(dim=-1)
        gained[:, [self.model.pad, self.model.bos]] = NEVER
        return gained

    def select(self, rows: Tensor, same_sources: bool = False) -> None:
        """Go on with these rows; as `State.select`."""
        if self.state is not None:
            self.state.select(rows, same_sources)
        elif self.tokens is not None:
            self.tokens = self.tokens[rows]
            self.memory = Memory(*(t[rows] for t in self.memory))


@contextmanager
def _evaluating(model: Seq2Seq) -> Iterator[None]:
    """Eval mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

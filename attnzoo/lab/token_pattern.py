"""How far heads attend as a pattern over the tokens says: what three probes share."""

from abc import abstractmethod
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from attnzoo.core import NonNegativeInt, PositiveInt, Probe
from attnzoo.errors import ZooError
from attnzoo.lab.finding import Finding
from attnzoo.lab.tokens import BOS, crosses, drawn, exist, ids_of, words_of

if TYPE_CHECKING:
    from attnzoo.lab.maps import Map
    from attnzoo.lab.subject import Subject

SCORES = ("match", "mul", "abs")


@dataclass(kw_only=True, eq=False)
class TokenPattern(Probe):
    """How far each head attends as a pattern P over the tokens says, P_ij 1 where it expects attention and 0 elsewhere.

    The table has three scores, with A the map of a head and n the tokens: `match`, the mean of Σ_j A_ij P_ij over the
    queries for which P expects anything; `mul`, Σ A∘P / Σ A over all queries, so that queries without a match keep
    even a perfect head below 1; `abs`, 1 − n · mean |A − P|, which can be negative. The last two are the mean over
    sequences. `uniform` is what a head would score (in `by`) that gives the same to every key that it may see.

    Args:
        by: The score that the figure shows, `match`, `mul` or `abs`.
        on: `repeated`: random sequences made from `seed`, of words that the data show, each sequence repeated; or the
            `data` as they are.
        length: Tokens of a random sequence before it is repeated; when None as many as let all repeats together be
            as long as the data. Its words are all different where the data show enough.
        repeats: How often it stands there in all; 1 for once.
        count: How many random sequences.
        seed: What they are drawn from.
        exclude_first: Whether attention to the first token is left out.
        exclude_current: Whether attention of a token to itself is left out.
    """

    by: Literal["match", "mul", "abs"] = "match"
    on: Literal["repeated", "data"] = "repeated"
    length: PositiveInt | None = None
    repeats: PositiveInt = 2
    count: PositiveInt = 32
    seed: NonNegativeInt = 0
    exclude_first: bool = False
    exclude_current: bool = False

    @abstractmethod
    def pattern(self, ids: Tensor) -> Tensor:
        """Where attention is expected, boolean (b n n), for tokens (b n)."""

    def measure(self, subject) -> Finding:
        shown = repeated(subject, self) if self.on == "repeated" else subject
        sums: dict[Any, Any] = defaultdict(float)
        for batch, maps in shown.maps():
            for leaf, found, _ in maps:
                if not crosses(leaf):
                    self._count(sums, leaf, found, ids_of(leaf, batch), shown)
        rows = []
        looked = [leaf for leaf in shown.leaves if (leaf, self.by) in sums]
        for leaf in looked:
            for head in range(leaf.heads):
                scores = {name: _ratio(sums[leaf, name], sums[leaf, name, "of"], head) for name in SCORES}
                uniform = _ratio(sums[leaf, "uniform"], sums[leaf, self.by, "of"], head)
                rows.append(subject.about(leaf, head) | scores | {"uniform": uniform})
        if not rows:
            raise ZooError(
                "AZ924",
                f"no mechanism of `{subject.name}` has a map of one sequence",
                help="a map between two sequences has no such pattern",
            )
        notes = self._notes(shown)
        if not any(sums[leaf, "match", "of"] for leaf in looked):
            notes.append("Nowhere in these sequences is such attention expected.")
        return Finding.of(rows, shows=self.by, figures=self.figures(shown), notes=notes)

    def figures(self, shown: "Subject") -> dict[str, float]:
        """Numbers about the whole model.

        Args:
            shown: The model with what it is shown: random sequences, or the data.
        """
        return {}

    def _count(self, sums: dict, leaf: Any, found: "Map", ids: Tensor, shown: "Subject") -> None:
        """Add what one map scores: sums over queries or sequences (h,), and over how many of them."""
        there, n = exist(shown, ids), ids.shape[1]
        counts = torch.ones(n, n, dtype=torch.bool, device=ids.device)  # pairs that are looked at
        if self.exclude_first:
            counts[:, 0] = False
        if self.exclude_current:
            counts.fill_diagonal_(False)
        counts = (there[:, :, None] & there[:, None, :] & counts)[:, None]  # (b 1 n n)
        wanted = self.pattern(ids)[:, None] & counts
        seen = torch.ones_like(wanted) if found.allowed is None else found.allowed
        uniform = seen.double() / seen.sum(dim=-1, keepdim=True).clamp(min=1)
        for score, (value, of) in _scores(found.rows() * counts, wanted, there).items():
            sums[leaf, score] += value
            sums[leaf, score, "of"] += of
        sums[leaf, "uniform"] += _scores(uniform * counts, wanted, there)[self.by][0].expand(leaf.heads)

    def _notes(self, shown: "Subject") -> list[str]:
        notes = []
        if self.on == "repeated":
            first = shown.batches[0].inputs[0]
            length = (first.shape[1] - (shown.kind == "pairs")) // self.repeats
            words = (
                f"{length} words" if length <= len(words_of(shown)) else f"{length} words, some of them alike"
            )
            notes.append(f"Shown {self.count} random sequences of {words}, {self.repeats} times each.")
        if any(crosses(leaf) for leaf in shown.leaves):
            notes.append("Attention between two sequences is left out.")
        return notes


def _scores(weights: Tensor, wanted: Tensor, there: Tensor) -> dict[str, tuple[Tensor, float]]:
    """The sum of each score over queries or sequences, (h,), and over how many.

    Args:
        weights: What counts of the map, (b h n n).
        wanted: The pattern, (b 1 n n).
        there: Which tokens exist, (b n).
    """
    hit = (weights * wanted).sum(dim=-1)  # (b h n)
    total = weights.sum(dim=(2, 3)).clamp(min=torch.finfo(weights.dtype).tiny)
    off = (weights - wanted.double()).abs().sum(dim=(2, 3)) / there.sum(dim=1).clamp(min=1)[:, None]
    return {
        "match": (hit.sum(dim=(0, 2)), float(wanted.any(dim=-1).sum())),
        "mul": ((hit.sum(dim=2) / total).sum(dim=0), float(len(weights))),
        "abs": ((1 - off).sum(dim=0), float(len(weights))),
    }


def _ratio(value: Tensor, of: float, head: int) -> float:
    return float(value[head]) / of if of else float("nan")


def repeated(subject: "Subject", probe: TokenPattern) -> "Subject":
    """The model with random sequences, each repeated; a beginning before them where it was trained with one.

    Args:
        subject: Its data say how long, and which words.
        probe: Says how many, how long and how often.

    Raises:
        ZooError: AZ926, when the data are too short to say; AZ927, when they are no tokens.
    """
    generator = torch.Generator().manual_seed(probe.seed)
    batch, parts = subject.batches[0], []
    for part, ids in enumerate(batch.inputs):
        words, begin = words_of(subject, part), int(subject.kind == "pairs")
        length = probe.length or (ids.shape[1] - begin) // probe.repeats
        if not length or not len(words):
            raise ZooError(
                "AZ926",
                f"sequences of {ids.shape[1]} tokens leave no room for one that stands {probe.repeats} times",
                help="show longer ones, or say how long: length=8",
            )
        made = drawn(words, probe.count, length, generator).repeat(1, probe.repeats)
        parts.append(torch.cat([made.new_full((probe.count, begin), BOS), made], dim=1))
    targets = torch.cat([parts[-1][:, 1:], parts[-1].new_full((probe.count, 1), -100)], dim=1)
    return replace(subject, batches=[replace(batch, inputs=tuple(parts), targets=targets)], training=())

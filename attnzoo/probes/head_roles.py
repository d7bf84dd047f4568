"""What heads are for: a neighbour, rare tokens, a relation of grammar; and how sure they are.

Voita et al., "Analyzing Multi-Head Self-Attention: Specialized Heads Do the Heavy Lifting, the Rest Can Be Pruned",
2019, arXiv:1905.09418, §4 (confidence), §5 (roles).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnzoo.core import Fraction, InstrumentCard, Layout, Paper, PositiveInt, Probe
from attnzoo.errors import ZooError
from attnzoo.lab.finding import Finding
from attnzoo.lab.tokens import EOS, PAD, crosses, ids_of, keys_of, side_of

if TYPE_CHECKING:
    from attnzoo.lab.points import Leaf
    from attnzoo.lab.subject import Batch, Subject

NAN = float("nan")
NOBODY = -2
"""The strongest key of a query that looks at nobody; −1 is where there is no token."""
ABOVE = 0.1
"""How far above chance a head for rare tokens is."""


@dataclass(kw_only=True, eq=False)
class HeadRoles(Probe):
    """Where the strongest key of each query is, and how strong: `confidence` is the mean over queries of max_j A_ij.

    A head is *positional* where it is at one fixed offset for nearly all queries that have a key there: `positional` is
    the largest share over offsets, on a line −1 and +1, on a grid of an image the eight around. *rare* where it is the
    token of the sequence that is least frequent in the data: `rare` is the share of queries, `chance` what it would be
    if any token was taken. *syntactic* where it is the other end of a relation, for more queries than the best fixed
    offset is: `syntactic` is the share for the relation with the greatest lead over that, `baseline` the offset's.

    Args:
        offsets: How far offsets go.
        positional: Share from which a head is positional.
        rare: Share from which it is one for rare tokens; 0.1 above chance too.
        rarest: How many of the least frequent words of a sequence count as rare; the paper has 1, and 2.
        margin: How far a syntactic head is above the baseline.
        dependencies: For each relation of grammar, by name, the index of the token at its other end for every token of
            every sample, (samples n), −1 where there is none. Of pairs they are about the sources.
        ignore: Ids that count neither as query nor as key; of pairs the end when None, padding in any case.
    """

    card = InstrumentCard(
        "head_roles",
        "What each head is for: a neighbour, rare tokens, a relation of grammar; and how sure it is.",
        equation="confidence_h = mean_i max_j A_ij",
        paper=Paper(
            "Analyzing Multi-Head Self-Attention: Specialized Heads Do the Heavy Lifting, the Rest Can Be Pruned",
            "Voita et al.",
            2019,
            "arXiv:1905.09418",
            "§4, §5",
        ),
        needs={"weights"},
        fidelity="adapted",
        notes="From which share a head is one for rare tokens the paper does not say, nor are its offsets on a grid. Of"
        " maps that may be negative the positive part counts, rescaled to 1.",
    )
    offsets: PositiveInt = 1
    positional: Fraction = 0.9
    rare: Fraction = 0.5
    rarest: PositiveInt = 1
    margin: Fraction = 0.1
    dependencies: Mapping[str, Tensor | Sequence[Sequence[int]]] | None = field(default=None, repr=False)
    ignore: Sequence[int] | None = None

    def measure(self, subject) -> Finding:
        relations, often = self._relations(subject), _frequencies(subject)
        sums: dict[Any, Any] = defaultdict(float)
        usual: dict[str, Counter] = defaultdict(Counter)  # offsets of each relation
        first = 0
        for batch, maps in subject.maps():
            ends = {name: of[first : first + len(batch)] for name, of in relations.items()}
            first += len(batch)
            for leaf, found, layout in maps:
                weights = found.rows()
                queries, keys = self._counted(subject, leaf, batch, weights)
                strength, best = (weights * keys[:, None, None]).max(dim=-1)  # (b h n)
                sums[leaf, "confidence"] += (strength * queries[:, None]).sum(dim=(0, 2))
                sums[leaf, "queries"] += float(queries.sum())
                best = best.masked_fill(strength <= 0, NOBODY)
                if often:
                    rare = self._fewest(keys_of(leaf, batch), often[side_of(leaf)], keys)
                    seen = (
                        keys[:, None, None] if found.allowed is None else keys[:, None, None] & found.allowed
                    )
                    self._rare(sums, leaf, best, queries, rare, seen)
                if not crosses(leaf):
                    self._positional(sums, leaf, best, queries, keys, layout)
                if side_of(leaf) == 0 and not crosses(leaf):
                    for name, of in ends.items():
                        asked = (queries & (of[:, : queries.shape[1]] >= 0))[:, None]
                        hit = (best == of[:, None, : queries.shape[1]]) & asked
                        sums[leaf, name] += hit.sum(dim=(0, 2))
                        sums[leaf, name, "of"] += float(asked.sum())
            for name, of in ends.items():
                usual[name].update((of - torch.arange(of.shape[1], device=of.device))[of >= 0].tolist())
        baselines = {name: max(of.values()) / of.total() for name, of in usual.items() if of}
        there = [leaf for leaf in subject.leaves if (leaf, "queries") in sums]
        rows = [
            subject.about(leaf, head) | self._row(sums, leaf, head, baselines)
            for leaf in there
            for head in range(leaf.heads)
        ]
        return Finding.of(rows, shows="confidence")

    def _row(self, sums: dict, leaf: "Leaf", head: int, baselines: dict[str, float]) -> dict[str, Any]:
        """What is said of a head."""

        def share(*of: Any) -> float:
            return (
                float(sums[leaf, *of][head] / max(sums[leaf, *of, "of"], 1)) if (leaf, *of) in sums else NAN
            )

        offsets = {
            key[2]: share(*key[1:]) for key in list(sums) if key[:2] == (leaf, "offset") and len(key) == 3
        }
        offset = max(offsets, key=lambda one: offsets[one]) if offsets else None
        leads = {name: share(name) - usual for name, usual in baselines.items() if (leaf, name) in sums}
        relation = max(leads, key=lambda one: leads[one]) if leads else None
        row: dict[str, Any] = {
            "confidence": float(sums[leaf, "confidence"][head] / max(sums[leaf, "queries"], 1)),
            "positional": offsets[offset] if offset else NAN,
            "offset": " ".join(f"{step:+d}" for step in offset) if offset else None,
            "rare": share("rare"),
            "chance": float(sums[leaf, "chance"] / max(sums[leaf, "rare", "of"], 1))
            if (leaf, "rare") in sums
            else NAN,
        }
        if baselines:
            row |= {"relation": relation, "syntactic": share(relation) if relation else NAN}
            row["baseline"] = baselines[relation] if relation else NAN
        roles = []
        if row["positional"] >= self.positional:
            roles.append("positional")
        if row["rare"] >= max(self.rare, row["chance"] + ABOVE):
            roles.append("rare")
        if relation and leads[relation] >= self.margin:
            roles.append("syntactic")
        return row | {"role": ", ".join(roles) or None}

    def _relations(self, subject: "Subject") -> dict[str, Tensor]:
        """The dependencies as tensors, once they fit."""
        if self.dependencies and subject.kind == "images":
            raise ZooError("AZ927", "`head_roles`: relations of grammar are of words, and these are images")
        count = sum(map(len, subject.batches))
        longest = max(batch.inputs[0].shape[1] for batch in subject.batches)
        found = {}
        for name, given in (self.dependencies or {}).items():
            try:
                ends = torch.as_tensor(given)
            except (TypeError, ValueError):  # lists of different lengths
                ends = torch.empty(0)
            if ends.ndim != 2 or len(ends) != count or ends.shape[1] < longest or ends.is_floating_point():
                raise ZooError(
                    "AZ921",
                    f"`head_roles`: `dependencies` of {name!r} do not fit the data",
                    why=f"there are {count} samples of up to {longest} tokens",
                    help="give the index of the other end for every token, and -1 where there is none",
                )
            found[name] = ends.to(subject.batches[0].inputs[0].device)
        return found

    def _counted(
        self, subject: "Subject", leaf: "Leaf", batch: "Batch", weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which queries (b n) and which keys (b m) of a map (b h n m) count."""
        if subject.kind == "images" or batch.inputs[0].is_floating_point():
            there = torch.ones_like(weights[:, 0], dtype=torch.bool)
            return there[:, :, 0], there[:, 0]
        ignored = [EOS] if self.ignore is None and subject.kind == "pairs" else list(self.ignore or ())
        ignored += [PAD] if subject.kind == "pairs" else []
        ids, keys = ids_of(leaf, batch), keys_of(leaf, batch)
        return ~torch.isin(ids, ids.new_tensor(ignored)), ~torch.isin(keys, keys.new_tensor(ignored))

    def _positional(
        self, sums: dict, leaf: "Leaf", best: Tensor, queries: Tensor, keys: Tensor, layout: Layout
    ) -> None:
        """How many queries look at each offset, of those that have a key there."""
        b, _, n = best.shape
        for offset in product(range(-self.offsets, self.offsets + 1), repeat=len(layout.grid)):
            if any(offset):
                at = neighbour(layout, offset).to(best.device)  # (n,)
                asked = queries & (at >= 0) & keys.gather(1, at.clamp(min=0).expand(b, n))
                sums[leaf, "offset", offset] += ((best == at) & asked[:, None]).sum(dim=(0, 2))
                sums[leaf, "offset", offset, "of"] += float(asked.sum())

    def _rare(
        self, sums: dict, leaf: "Leaf", best: Tensor, queries: Tensor, rare: Tensor, seen: Tensor
    ) -> None:
        """How many queries look at a rare token, and how many would by chance.

        Args:
            sums: What is added to.
            leaf: Whose heads.
            best: The strongest key of each query, (b h n).
            queries: Which count, (b n).
            rare: Which keys are rare, (b m).
            seen: Which keys a query may see, broadcasts to (b h n m).
        """
        b, h, n = best.shape
        hit = rare[:, None].expand(b, h, -1).gather(2, best.clamp(min=0)) & (best >= 0) & queries[:, None]
        chance = (seen & rare[:, None, None]).sum(dim=-1) / seen.sum(dim=-1).clamp(min=1)  # (b h n)
        sums[leaf, "rare"] += hit.sum(dim=(0, 2))
        sums[leaf, "rare", "of"] += float(queries.sum())
        sums[leaf, "chance"] += float((chance * queries[:, None]).mean(dim=1).sum())

    def _fewest(self, words: Tensor, often: Tensor, counted: Tensor) -> Tensor:
        """Which tokens (b m) are among the least frequent words of their sequence."""
        found = []
        for row, known in zip(words, counted, strict=True):
            counts = often[row[known].unique()].sort().values
            most = counts[min(self.rarest, len(counts)) - 1] if len(counts) else -1
            found.append(known & (often[row] <= most))
        return torch.stack(found)

    def draw(self, finding: Finding, figure: Any) -> None:
        """Layers × heads, coloured by confidence, with the role of each head."""
        values, layers, heads = finding.matrix("confidence"), finding.layers(), finding.heads()
        figure.set_size_inches(2.4 + 0.75 * max(len(heads), 4), 1.6 + 0.45 * max(len(layers), 2))
        axes = figure.subplots()
        image = axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for row in finding.rows():
            named = {"positional": row["offset"], "rare": "rare", "syntactic": row.get("relation")}
            roles = [named[role] for role in (row["role"] or "").split(", ") if role]
            head = f"{row['branch']} {row['head']}" if row["branch"] else str(row["head"])
            x, y = heads.index(head), layers.index(row["site"])
            colour = "white" if values[y, x] > 0.6 else "black"
            axes.text(x, y, "\n".join(roles), ha="center", va="center", fontsize="small", color=colour)
        axes.set_xticks(range(len(heads)), heads)
        axes.set_yticks(range(len(layers)), layers)
        axes.set_xlabel("head")
        axes.set_title("head roles")
        figure.colorbar(image, ax=axes, label="confidence")


def neighbour(layout: Layout, offset: Sequence[int]) -> Tensor:
    """The token at an offset from each, (n,); −1 where there is none, and of prefix tokens.

    Args:
        layout: How the tokens are arranged.
        offset: A step for each dimension of the grid.
    """
    grid = torch.tensor(layout.grid)
    places = torch.cartesian_prod(*(torch.arange(side) for side in layout.grid)).view(-1, len(grid))
    moved = places + torch.tensor(offset)
    inside = ((moved >= 0) & (moved < grid)).all(dim=1)
    strides = torch.tensor([math.prod(layout.grid[i + 1 :]) for i in range(len(grid))])
    found = layout.prefix + (moved * strides).sum(dim=1)
    return torch.cat([torch.full((layout.prefix,), -1), found.masked_fill(~inside, -1)])


def _frequencies(subject: "Subject") -> list[Tensor]:
    """How often each id stands in each of the inputs; empty where they are no words."""
    if subject.kind == "images" or subject.batches[0].inputs[0].is_floating_point():
        return []
    sides = range(len(subject.batches[0].inputs))
    return [torch.cat([batch.inputs[i].flatten() for batch in subject.batches]).bincount() for i in sides]

"""Through which layers and tokens an answer comes: what is spoilt, and what mends it.

Meng et al., "Locating and Editing Factual Associations in GPT", 2022, arXiv:2202.05262, §2: causal tracing. Li et al.,
arXiv:2511.05923: the same for images, groups of tokens and components (FCCT), with the recovery rate.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.core import InstrumentCard, Layout, Paper, Probe
from attnzoo.core.options import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt
from attnzoo.errors import ZooError
from attnzoo.lab.finding import Finding

KINDS = {"hidden": "block", "attention": "output", "mlp": "mlp"}
"""Where what a component gives passes by."""
GAP = 1e-4
"""Probabilities before and after corruption that differ by less have nothing to recover."""
INPUT = "input"


@dataclass(kw_only=True, eq=False)
class CausalTrace(Probe):
    """RR = (P_patched − P_corrupted) / (P_clean − P_corrupted), P the mean probability of the answer.

    `clean`: the model runs. `corrupted`: noise is added before the first layer, the same for every sample and cut into
    batches in any way. `patched`: the same noise, and what one component of one layer gave for some tokens when all was
    clean is put back. `effect` is P_patched − P_corrupted, the average indirect effect; `recovery` is RR, without value
    where noise changes P by less than 0.0001. Of sequences, P is e to the mean log-probability of all that is asked.

    Args:
        components: What is put back: what a layer gives (`hidden`), what its `attention` or its `mlp` adds.
        corrupt: Which tokens get noise, of those that enter the first layer: `all`, or the name of a group. `input` is
            noise on the image itself.
        noise: How much, in standard deviations of all that gets it (3 in the paper on sequences), or as it is.
        unit: `sd`, or `absolute` (0.1 in the code of that paper).
        copies: How many draws of noise are averaged (10 in that code).
        window: How many layers around one are put back together, of attention and MLP (10 in that paper).
        groups: Tokens by name of the group, counted from 0, or from the last, -1. By default images have the `class`
            token with all that is before the grid, the `object` and `other` tokens; sequences the `last` token, the
            `early` half of what is before it, and the `late` half. There is always the group of `all`.
        object_share: Share of the grid that is the object: the tokens whose pixels differ most within an image.
        answer: `true`, the target; or the model's `own` when all is clean.
        seed: Of the noise.
    """

    card = InstrumentCard(
        "causal_trace",
        "Through which layers, components and tokens the answer comes: noise on the input, and what recovers from it.",
        equation="RR = (P_patched − P_corrupted) / (P_clean − P_corrupted)",
        paper=Paper(
            "Locating and Editing Factual Associations in GPT", "Meng et al.", 2022, "arXiv:2202.05262", "§2"
        ),
        fidelity="adapted",
        notes="No subject is marked in images: the tokens with the most contrast stand for it, or name `groups`. "
        "Rates are of means, not means of rates. Padding counts among the tokens of a sequence.",
    )
    components: Sequence[Literal["hidden", "attention", "mlp"]] = ("hidden", "attention", "mlp")
    corrupt: str = "all"
    noise: NonNegativeFloat = 3.0
    unit: Literal["sd", "absolute"] = "sd"
    copies: PositiveInt = 4
    window: PositiveInt = 1
    groups: dict[str, list[int]] | None = None
    object_share: Fraction = 0.25
    answer: Literal["true", "own"] = "true"
    seed: NonNegativeInt = 1

    @torch.no_grad()
    def measure(self, subject) -> Finding:
        layout = subject.layout if subject.kind == "images" else None
        names = self._names(layout)
        if self.corrupt not in (*names, INPUT):
            raise ZooError(
                "AZ921",
                f"`causal_trace`: there is no group `{self.corrupt}` to corrupt",
                help=f"there are {', '.join(names)}, and `{INPUT}`",
            )
        if self.corrupt == INPUT and subject.kind != "images":
            raise ZooError(
                "AZ927",
                f"noise on the input needs images, and `{subject.name}` is given {subject.kind}",
                help="leave `corrupt` out: then the embeddings get it",
            )
        places = {
            kind: _places(subject.leaves, kind)
            for kind in dict.fromkeys(KINDS[one] for one in self.components)
        }
        scale = self.noise * (self._spread(subject) if self.unit == "sd" else 1)
        sums: dict[Any, float] = defaultdict(float)
        for batch, clean, output in subject.recorded(*places):
            asked = self._asked(subject, batch, output)

            def share(asked=asked, batch=batch) -> float:
                return float(subject.shares(subject.call(batch), asked).sum())

            sums["samples"] += len(batch)
            sums["clean"] += float(subject.shares(output, asked).sum())
            for copy in range(self.copies):
                with self._corrupted(subject, batch, layout, scale, self.seed + copy):
                    sums["corrupted"] += share() / self.copies
                    for component in self.components:
                        kind = KINDS[component]
                        for i, leaf in enumerate(places[kind]):
                            there = self._window(places[kind], i, kind)
                            for name in names:
                                with subject.editing(
                                    kind, self._patch(name, kind, clean, batch), among=there
                                ):
                                    sums[component, leaf, name] += share() / self.copies
        return self._found(subject, places, names, sums)

    def _found(self, subject, places: Mapping, names: Sequence[str], sums: Mapping[Any, float]) -> Finding:
        p = {key: value / sums["samples"] for key, value in sums.items()}
        gap = p["clean"] - p["corrupted"]
        rows = [
            subject.about(leaf)
            | {"branch": "", "component": component, "tokens": name, "p": p[component, leaf, name]}
            | {"effect": (effect := p[component, leaf, name] - p["corrupted"])}
            | {"recovery": effect / gap if abs(gap) >= GAP else math.nan}
            for component in self.components
            for leaf in places[KINDS[component]]
            for name in names
        ]
        notes = []
        if abs(gap) < GAP:
            notes.append(
                "The noise changes next to nothing, so there is nothing to recover: let there be more."
            )
        elif gap < 0:
            notes.append("The noise makes the answer more probable: recovery is of a rise, not of a fall.")
        figures = {"p_clean": p["clean"], "p_corrupted": p["corrupted"], "total_effect": gap}
        return Finding.of(rows, shows="recovery", figures=figures, notes=notes)

    def _names(self, layout: Layout | None) -> list[str]:
        """Names of the groups; of sequences without a layout."""
        if self.groups is not None:
            return list(dict.fromkeys([*self.groups, "all"]))
        if layout is None:
            return ["early", "late", "last", "all"]
        return [*(["class"] if layout.prefix else []), "object", "other", "all"]

    def _mask(self, name: str, n: int, layout: Layout, batch) -> Tensor:
        """Which of n tokens are in a group, (b n) or (1 n).

        Raises:
            ZooError: AZ923, when there is no such token; AZ924, when tokens do not lie as the images do.
        """
        place = torch.arange(n)[None]
        if self.groups is not None and name in self.groups:
            if strange := [i for i in self.groups[name] if not -n <= i < n]:
                raise ZooError("AZ923", f"there is no token {strange[0]}", help=f"there are {n}, from 0")
            return torch.isin(place, torch.tensor([i % n for i in self.groups[name]], dtype=torch.long))
        if name == "all":
            return place >= 0
        if name in ("early", "late", "last"):
            half, last = (n - 1) // 2, n - 1
            return {"early": place < half, "late": (place >= half) & (place < last), "last": place == last}[
                name
            ]
        if n != layout.length:
            raise ZooError(
                "AZ924",
                f"{n} tokens do not lie as {layout}, so that none can be said to be the object",
                help="name tokens by their numbers: groups={'first': [0]}",
            )
        here = place < layout.prefix
        seen = F.pad(self._object(batch.inputs[0].cpu(), layout), (layout.prefix, 0))
        return {"class": here, "object": seen, "other": ~here & ~seen}[name]

    def _object(self, images: Tensor, layout: Layout) -> Tensor:
        """The grid tokens whose pixels differ most, (b prod(grid))."""
        y, x = layout.grid
        squares, means = (F.adaptive_avg_pool2d(t, (y, x)) for t in (images.square(), images))
        contrast = (squares - means.square()).mean(dim=1).flatten(1)
        chosen = contrast.argsort(dim=1, descending=True, stable=True)[:, : round(self.object_share * y * x)]
        return torch.zeros_like(contrast, dtype=torch.bool).scatter(1, chosen, True)

    def _patch(self, name: str, kind: str, clean: Mapping, batch) -> Callable:
        """Puts back what was given for a group of tokens when all was clean."""

        def patch(leaf, tensor, here):  # (b n c)
            mask = self._mask(name, tensor.shape[1], here.layout, batch).to(tensor.device)
            return torch.where(mask[..., None], clean[kind, leaf], tensor)

        return patch

    def _window(self, places: Sequence[Any], i: int, kind: str) -> Sequence[Any]:
        """The layers that are put back together: as many before as after, an even one more before."""
        width = 1 if kind == "block" else self.window
        return places[max(0, i - width // 2) : i + (width + 1) // 2]

    def _asked(self, subject, batch, output: Tensor) -> Any:
        """The batch, with the answers that are asked for."""
        if self.answer == "true":
            return batch
        own = output.argmax(dim=-1)
        return replace(
            batch, targets=own if batch.targets is None else own.where(batch.targets != -100, -100)
        )

    @contextmanager
    def _corrupted(self, subject, batch, layout: Layout | None, scale: float, seed: int) -> Iterator[None]:
        """Noise before the first layer, while the block runs."""

        def add(_module, args: tuple) -> tuple:
            generator = torch.Generator().manual_seed(seed)
            noise = scale * torch.randn(1, *args[0].shape[1:], generator=generator).to(args[0])
            if self.corrupt != INPUT:
                n = args[0].shape[1]
                mask = self._mask(self.corrupt, n, layout or Layout((n,)), batch)
                noise = noise * mask[..., None].to(noise)
            return args[0] + noise, *args[1:]

        hook = self._entrance(subject).register_forward_pre_hook(add)
        try:
            yield
        finally:
            hook.remove()

    def _entrance(self, subject) -> Any:
        """What the noise stands before."""
        return subject.model if self.corrupt == INPUT else subject.leaves[0].block

    def _spread(self, subject) -> float:
        """Standard deviation of all that gets noise."""
        entering: list[Tensor] = []
        hook = self._entrance(subject).register_forward_pre_hook(lambda _, args: entering.append(args[0]))
        try:
            subject.outputs()
        finally:
            hook.remove()
        count = sum(x.numel() for x in entering)
        mean = sum(float(x.double().sum()) for x in entering) / count
        return math.sqrt(sum(float((x.double() - mean).square().sum()) for x in entering) / count)

    def draw(self, finding: Any, figure: Any) -> None:
        """Layers × groups of tokens in colours, a picture for each component."""
        table, shown = list(finding.rows()), "recovery"
        if any(math.isnan(row[shown]) for row in table):
            shown = "effect"
        names = list(dict.fromkeys(finding["tokens"]))
        most = max(abs(row[shown]) for row in table) or 1
        figure.set_size_inches(
            1.5 + len(self.components) * (1.2 + 0.5 * len(names)), 1.8 + 0.3 * len(finding.layers())
        )
        panels = figure.subplots(1, len(self.components), squeeze=False)[0]
        for axes, component in zip(panels, self.components, strict=True):
            own = [row for row in table if row["component"] == component]
            sites = list(dict.fromkeys(row["site"] for row in own))
            values = torch.tensor([row[shown] for row in own]).reshape(len(sites), len(names))
            image = axes.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
            axes.set_xticks(range(len(names)), names)
            axes.set_yticks(range(len(sites)), sites)
            axes.set_title(component, fontsize="medium")
        figure.colorbar(image, ax=list(panels), label=shown)


def _places(leaves: Sequence[Any], kind: str) -> list[Any]:
    """The leaves where something passes by; of those that share it the first."""
    found: dict[Any, Any] = {}
    for leaf in leaves:
        module = {"block": leaf.block, "output": leaf.outer, "mlp": leaf.mlp}[kind]
        if module is not None:
            found.setdefault(module, leaf)
    return list(found.values())

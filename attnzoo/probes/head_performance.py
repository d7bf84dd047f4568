"""Which labels each head recognises by itself.

Gross et al., "Low-latency vision transformers via large-scale multi-head attention", 2025, arXiv:2506.23832, and the
papers of the same group on single filters and nodes, whose three steps these are: cut the model at a layer, train a new
linear read-out there, silence all of it but one head.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.core import InstrumentCard, Paper, Probe
from attnzoo.core.options import Fraction, PositiveFloat
from attnzoo.lab.finding import Finding

LARGEST = 2**25
"""Numbers of the field matrices of a layer, up to which they are handed out."""


class Seen(NamedTuple):
    """What a layer makes of samples.

    Args:
        z: Pooled features (samples c).
        labels: True classes (samples,).
        classes: How many classes the model knows.
    """

    z: Tensor
    labels: Tensor
    classes: int


class Readout(NamedTuple):
    """Logits are `weight` (z − `centre`) + `bias`: (k c), (c,), (k,)."""

    weight: Tensor
    centre: Tensor
    bias: Tensor


@dataclass(kw_only=True, eq=False)
class HeadPerformance(Probe):
    """F^h_ab = mean over samples of label a of W_b,h · z_h, the field that head h alone raises for output b, (k k).

    z are the features of a layer, pooled over the tokens, (c,); W is a read-out that is trained on them anew
    (logistic regression, on `Subject.training`), of which W_h reads head h. The fields of all heads and the bias
    add up to the mean logits exactly. Divided by its largest entry and cut at θ, a field becomes Boolean, B = F >
    θ. A cluster is a set of labels whose block of B is all ones: the head says "one of these". Noise n counts the
    ones outside of the blocks. Of N_c clusters of mean size C_s and k labels, signal is Σ_h N_c C_s / k, noise Σ_h
    [N_c C_s (C_s − 1) + n] / k(k − 1), and `snr` the one by the other: of a head alone in the table, of layers
    among the figures, with the `field_snr` of the same: mean diagonal entry of Σ_h F^h ⊙ B^h by mean entry beside
    it.

    Args:
        at: Names of sites, with `*`.
        tap: Where features are taken: `heads`, what heads give before the output projection mixes them; or `block`,
            what the layer gives, whose channels are shared out among the heads in order.
        pool: How tokens become one: as the `model` itself does before it says a class (class token, sequence pooling
            with its weights, or mean), by the `class` token, or by the `mean` of the grid.
        threshold: θ.
        normalise: Whether a field is divided by its own largest entry (`each`) or by that of its layer (`layer`).
        centre: Whether fields count from the mean of z in training, whose part goes to the bias; the papers' do not.
        penalty: Weight of |W|²/2 beside the mean cross-entropy, on features of mean variance 1.
    """

    card = InstrumentCard(
        "head_performance",
        "Which labels each head recognises by itself: clusters, noise, signal-to-noise ratio.",
        equation="F_ab = E[W_b,h · z_h | label a], B = F > θ, SNR = Σ_h N_c C_s (k − 1) / Σ_h [N_c C_s (C_s − 1) + n]",
        paper=Paper(
            "Low-latency vision transformers via large-scale multi-head attention",
            "Gross et al.",
            2025,
            "arXiv:2506.23832",
        ),
        needs={"heads", "labels", "classes"},
        fidelity="adapted",
        notes="The paper's procedure is known from its abstract and from the group's papers on filters and nodes. "
        "Logistic regression, solved to the end, trains the read-out; clusters are found greedily, the largest first.",
    )
    at: str | Sequence[str] = "*"
    tap: Literal["heads", "block"] = "heads"
    pool: Literal["model", "class", "mean"] = "model"
    threshold: Fraction = 0.3
    normalise: Literal["each", "layer"] = "each"
    centre: bool = False
    penalty: PositiveFloat = 0.001

    part = "head"

    def measure(self, subject) -> Finding:
        from attnzoo.lab.points import chosen

        leaves = chosen(subject.able("heads"), self.at)
        fitted_on = copy(subject)
        fitted_on.batches = subject.training or subject.batches
        train, test = self._seen(fitted_on, leaves), self._seen(subject, leaves)
        rows: list[dict[str, Any]] = []
        arrays: dict[str, np.ndarray] = {}
        figures: dict[str, float] = {}
        for leaf in leaves:
            readout = self._readout(train[leaf])
            found, about, matrices = self._measured(subject, leaf, test[leaf], readout)
            rows += found
            figures |= {f"{name} {leaf.name}": value for name, value in about.items()}
            arrays |= {f"{name} {leaf.name}": value for name, value in matrices.items()}
        notes = []
        if missing := set(range(test[leaf].classes)) - set(test[leaf].labels.tolist()):
            notes.append(f"{len(missing)} of {test[leaf].classes} classes have no sample, and empty rows.")
        if not subject.training:
            notes.append("The read-out is trained on the same samples that are counted.")
        if subject.classes:
            arrays["classes"] = np.array(list(subject.classes))
        return Finding.of(rows, shows="snr", arrays=arrays, figures=figures, notes=notes)

    def _measured(self, subject, leaf, seen: Seen, readout: Readout) -> tuple[list, dict, dict]:
        """Rows, figures and arrays of a layer. One field at a time: those of all channels may not fit the memory."""
        parts, k = self.parts(leaf.heads, seen.z.shape[1]), seen.classes
        means = torch.stack([seen.z[seen.labels == label].mean(dim=0) for label in range(k)]) - readout.centre
        small, largest = len(parts) * k**2 <= LARGEST, None
        if self.normalise == "layer":
            largest = max(float(np.nanmax(field_of(means, readout, part))) for part in parts)
        rows, counts, members, fields, total = [], [], [], [], np.zeros((k, k))
        for i, part in enumerate(parts):
            field = field_of(means, readout, part)
            share = normalised(field, largest)
            boolean = share > self.threshold
            clusters = clusters_of(boolean)
            own = Counts.of(clusters, boolean)
            at = i if self.part == "head" else part.start * leaf.heads // seen.z.shape[1]
            rows.append(
                subject.about(leaf, at)
                | ({} if self.part == "head" else {self.part: i})
                | {"clusters": own.clusters, "size": own.size, "noise": own.noise}
                | {"accuracy": _accuracy(seen, readout, part), "snr": signal_to_noise([own], k)}
            )
            counts.append(own)
            members.append([next((c for c, one in enumerate(clusters) if x in one), -1) for x in range(k)])
            total += np.where(boolean, share, 0)
            fields += [field] if small else []
        about = {"accuracy": _accuracy(seen, readout), "snr": signal_to_noise(counts, k)}
        arrays = {"clusters": np.array(members), "means": means.numpy()}
        arrays |= {"weights": readout.weight.numpy(), "bias": readout.bias.numpy()}
        return (
            rows,
            about | {"field_snr": field_snr(total)},
            arrays | ({"fields": np.stack(fields)} if small else {}),
        )

    def parts(self, heads: int, channels: int) -> list[slice]:
        """The channels of each head.

        Args:
            heads: Number of heads.
            channels: Of the features.
        """
        width = channels // heads
        return [slice(head * width, (head + 1) * width) for head in range(heads)]

    def _readout(self, seen: Seen) -> Readout:
        weight, bias = logistic_regression(seen, self.penalty)
        mean = seen.z.mean(dim=0) if self.centre else torch.zeros(seen.z.shape[1], dtype=seen.z.dtype)
        return Readout(weight, mean, bias + weight @ mean)

    def _seen(self, subject, leaves: Sequence[Any]) -> dict[Any, Seen]:
        """Pooled features of each leaf, from one forward of each batch."""
        model, prefix = subject.model, subject.layout.prefix
        z: dict[Any, list[Tensor]] = {leaf: [] for leaf in leaves}
        pool: Any = getattr(model, "pool", None)
        learnt = self.pool == "model" and hasattr(pool, "weights")  # sequence pooling: what each token counts
        first = self.pool == "class" or (
            self.pool == "model" and getattr(model, "global_pool", "") == "token"
        )
        labels: list[Tensor] = []
        shares: list[Tensor] = []
        with ExitStack() as stack:
            if learnt:
                note = pool.register_forward_pre_hook(lambda _, args: shares.append(pool.weights(args[0])))
                stack.callback(note.remove)
            for batch, found, output in subject.recorded(self.tap):
                labels.append(subject.targets(batch).cpu())
                for leaf in leaves:
                    x = found[self.tap, leaf].double()
                    x = x.transpose(1, 2).flatten(2) if self.tap == "heads" else x  # (b n c)
                    if learnt:
                        one = (shares[-1] * x).sum(dim=1)
                    else:
                        one = x[:, 0] if first and prefix else x[:, prefix:].mean(dim=1)
                    z[leaf].append(one.cpu())
                classes = output.shape[-1]
        return {leaf: Seen(torch.cat(each), torch.cat(labels), classes) for leaf, each in z.items()}

    def draw(self, finding: Any, figure: Any) -> None:
        """The fields of the last layer's clearest heads, labels in the order of clusters, and the ratio by layer."""
        from matplotlib.patches import Rectangle

        layers = [name.removeprefix("snr ") for name in finding.figures if name.startswith("snr ")]
        fields = finding.arrays.get(f"fields {layers[-1]}", np.zeros((0, 1, 1)))
        members = finding.arrays[f"clusters {layers[-1]}"]
        rows = [row for row in finding.rows() if f"{row['site']} {row['branch']}".strip() == layers[-1]]
        best = sorted(range(len(fields)), key=lambda i: (-np.nan_to_num(rows[i]["snr"], nan=-1), i))[:8]
        columns = max(1, math.ceil(len(best) / 2))
        figure.set_size_inches(2.1 * columns + 3.2, 4.8)
        grid = figure.add_gridspec(2, columns + 1, width_ratios=[1] * columns + [1.3])
        for place, i in enumerate(best):
            axes = figure.add_subplot(grid[place // columns, place % columns])
            order = np.argsort(np.where(members[i] < 0, len(members[i]), members[i]), kind="stable")
            shown = normalised(fields[i])[np.ix_(order, order)]
            axes.imshow(shown, cmap="RdBu_r", vmin=-1, vmax=1)
            start = 0
            for size in np.bincount(members[i][members[i] >= 0]):
                axes.add_patch(Rectangle((start - 0.5, start - 0.5), size, size, fill=False, linewidth=1.5))
                start += size
            names = finding.arrays.get("classes", np.arange(len(order)).astype(str))[order]
            ticks = range(len(order)) if len(order) <= 20 else []
            axes.set_xticks(ticks, names[list(ticks)], rotation=90, fontsize="x-small")
            axes.set_yticks(ticks, names[list(ticks)], fontsize="x-small")
            axes.set_title(f"{self.part} {i}", fontsize="small")
        axes = figure.add_subplot(grid[:, columns])
        ratios = [finding.figures[f"snr {name}"] for name in layers]
        axes.barh(layers, [value if math.isfinite(value) else 0 for value in ratios], height=0.6)
        axes.invert_yaxis()
        axes.set_xlabel("signal-to-noise ratio")
        figure.suptitle(f"Fields of {layers[-1]}: rows are true labels, columns outputs", fontsize="medium")


def logistic_regression(seen: Seen, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights (k c) and biases (k,) of the least penalised cross-entropy, for features as they are.

    Args:
        seen: What it is fitted to.
        penalty: Weight of |W|²/2, on features of mean variance 1.
    """
    mean = seen.z.mean(dim=0)
    spread = (seen.z - mean).square().mean().sqrt().clamp(min=1e-12)
    x = (seen.z - mean) / spread  # one number for all channels: what a head hardly says stays small
    weight = torch.zeros(seen.classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(seen.classes, dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, seen.labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)  # type: ignore[arg-type]
    found = weight.detach() / spread
    return found, bias.detach() - found @ mean


def field_of(means: Tensor, readout: Readout, part: slice) -> np.ndarray:
    """The field of a part, by true label and output, (k k); NaN in the rows of labels without a sample.

    Args:
        means: Mean features of each label, from the centre, (k c).
        readout: Of which all but the part is silenced.
        part: Its channels.
    """
    return (means[:, part] @ readout.weight[:, part].T).numpy()


def normalised(field: np.ndarray, largest: float | None = None) -> np.ndarray:
    """A field divided by a number, by its largest entry when None; zeros where that is not above 0.

    Args:
        field: (k k).
        largest: What it is divided by.
    """
    largest = float(np.nanmax(field)) if largest is None else largest
    return field / largest if largest > 0 else np.zeros_like(field)


def clusters_of(boolean: np.ndarray) -> list[list[int]]:
    """Sets of labels whose blocks are all ones, none in two, the largest that is found first.

    Args:
        boolean: Which outputs (columns) are raised by which labels (rows), (k k).
    """
    mutual = boolean & boolean.T
    free = np.flatnonzero(np.diag(boolean))
    found = []
    while len(free):
        cluster: list[int] = []
        candidates = free
        while len(candidates):  # the label that most of the others agree with joins
            agree = mutual[np.ix_(candidates, candidates)].sum(axis=1)
            label = candidates[int(agree.argmax())]
            cluster.append(int(label))
            candidates = candidates[mutual[label, candidates] & (candidates != label)]
        found.append(sorted(cluster))
        free = np.setdiff1d(free, cluster)
    return sorted(found, key=lambda one: (-len(one), one))


class Counts(NamedTuple):
    """What is counted of a Boolean field.

    Args:
        clusters: How many.
        labels: How many labels are in them.
        noise: How many ones are outside of them.
    """

    clusters: int
    labels: int
    noise: int

    @classmethod
    def of(cls, clusters: Sequence[Sequence[int]], boolean: np.ndarray) -> "Counts":
        """Those of a Boolean field (k k) and its clusters."""
        inside = sum(len(one) ** 2 for one in clusters)
        return cls(len(clusters), sum(map(len, clusters)), int(boolean.sum()) - inside)

    @property
    def size(self) -> float:
        """Mean number of labels in a cluster."""
        return self.labels / self.clusters if self.clusters else math.nan


def signal_to_noise(counts: Sequence[Counts], k: int) -> float:
    """Signal by internal and external noise of some parts together; infinite without noise, NaN without either.

    Args:
        counts: Of each part.
        k: How many labels there are.
    """
    signal = sum(one.labels for one in counts) / k
    internal = sum(one.labels * (one.size - 1) for one in counts if one.clusters)
    noise = (internal + sum(one.noise for one in counts)) / (k * max(k - 1, 1))
    return signal / noise if noise else math.inf if signal else math.nan


def field_snr(total: np.ndarray) -> float:
    """Mean entry on the diagonal by mean entry beside it; infinite where there is nothing beside it, NaN for zeros.

    Args:
        total: Fields above the threshold, summed over the parts, (k k).
    """
    k, on = len(total), float(np.trace(total))
    off = (float(total.sum()) - on) / max(k - 1, 1)
    return on / off if off else math.inf if on else math.nan


def _accuracy(seen: Seen, readout: Readout, part: slice | None = None) -> float:
    """Share of labels that the read-out says, or a part of it alone, without the bias."""
    every = part or slice(None)
    logits = (seen.z - readout.centre)[:, every] @ readout.weight[:, every].T
    logits = logits + readout.bias if part is None else logits
    return float((logits.argmax(dim=1) == seen.labels).double().mean())

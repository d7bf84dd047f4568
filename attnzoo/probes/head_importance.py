"""What a model loses with a head.

Michel et al., "Are Sixteen Heads Really Better than One?", 2019, arXiv:1905.10650, §2.3, §3.2, §3.3 and §4.1: gradient,
leave-one-out, keep-one and pruning by tenths. Li et al., "How Does Attention Work in Vision Transformers?", TVCG 2023:
what pruning a head does to the answer.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attnzoo.core import InstrumentCard, Paper, Probe
from attnzoo.core.options import Fraction, NonNegativeInt, PositiveInt
from attnzoo.errors import ZooError
from attnzoo.lab.finding import Finding

Cut = Mapping[Any, Sequence[int]]
"""Heads that are taken away, by leaf."""
CHANGES = ("loss", "accuracy", "p_true", "kl", "js", "cosine")
"""What removing heads changes, by sample."""


@dataclass(kw_only=True, eq=False)
class HeadImportance(Probe):
    """I_h = E_x |∂L(x)/∂ξ_h| with a gate ξ_h = 1 on what the head gives, or what changes when heads give zero.

    `gradient`: the absolute value is taken of each sample, then the mean, `raw`; `importance` is that divided by
    the ℓ2 norm over the heads of the site. All other ways rerun the model with o_h ← 0 and say how the mean `loss`
    (nats) rises, how `accuracy` and `p_true`, the probability of the true class, fall, how far the answer moves
    (`kl` of the new from the old, and `js`, in nats) and how far what the classifier reads turns (`cosine`: 1 −
    cos). There `importance` is the rise of the loss (`leave_one_out`), minus its rise when the head is alone at its
    site (`keep_one`), or the fall of p_true (`pruning`, as Li et al.); `low` and `high` bound it by a paired
    bootstrap of the samples (95 %), and `p` says how often, on both sides, such a resample has the other sign.

    Args:
        by: `gradient`, `leave_one_out`, `keep_one` or `pruning`.
        tokens: What is removed of a head: what it gives to `all` tokens, to the `prefix` (class token, registers), or
            to those of the `grid`.
        curve: Share of all heads that is removed at a time, the least important first, until none is left; 0.1 in the
            paper, 0 for no such curve.
        resamples: How often the samples are drawn anew.
        seed: Of these draws.
    """

    card = InstrumentCard(
        "head_importance",
        "What the model loses with a head: by its gradient, or by removing it.",
        equation="I_h = E_x |∂L(x)/∂ξ_h|, o_h ← ξ_h o_h",
        paper=Paper(
            "Are Sixteen Heads Really Better than One?",
            "Michel et al.",
            2019,
            "arXiv:1905.10650",
            "§2.3, §3, §4.1",
        ),
        needs={"heads", "labels"},
        notes="The order of a pruning curve is found once, with all heads there. What a site has beside heads is never "
        "removed. Heads of all branches of a site share one norm.",
    )
    by: Literal["gradient", "leave_one_out", "keep_one", "pruning"] = "gradient"
    tokens: Literal["all", "prefix", "grid"] = "all"
    curve: Fraction = 0.0
    resamples: PositiveInt = 1000
    seed: NonNegativeInt = 0

    def measure(self, subject) -> Finding:
        heads = subject.heads("heads")
        if self.tokens == "prefix" and not subject.layout.prefix:
            raise ZooError(
                "AZ924",
                f"`{subject.name}` has no tokens before the grid",
                why="`tokens='prefix'` removes what heads give to the class token and registers",
                help="leave `tokens` out, or write tokens='grid'",
            )
        before = self._answers(subject, {})
        if self.by == "gradient":
            by_sample = self._gradients(subject, heads)
            columns = _normalised(heads, by_sample.mean(dim=0))
        else:
            by_sample, columns = self._removals(subject, heads, before)
        rows = [
            subject.about(*at) | {k: float(v[i]) for k, v in columns.items()} for i, at in enumerate(heads)
        ]
        arrays = {"by_sample": by_sample.T.numpy(), **_by_class(subject, by_sample)}
        figures = {"loss": _mean(before, "loss"), "accuracy": _mean(before, "accuracy")}
        if self.curve:
            arrays |= self._curve(subject, heads, columns["importance"])
        return Finding.of(rows, shows="importance", arrays=arrays, figures=figures)

    def _gradients(self, subject, heads: Sequence[tuple[Any, int]]) -> Tensor:
        """|∂L/∂ξ_h| of each sample, (samples heads): samples do not see each other, so one backward gives all."""
        found = []
        for batch in subject.batches:
            gates: dict[Any, Tensor] = {}

            def gated(leaf, out, here, gates=gates):  # (b h n d)
                gate = gates.setdefault(leaf, out.new_ones(out.shape[:2]).requires_grad_())
                return torch.where(self._rows(out, here), out * gate[:, :, None, None], out)

            with torch.enable_grad(), subject.editing("heads", gated):
                loss = subject.losses(subject.call(batch), batch).sum()
            grads = torch.autograd.grad(loss, list(gates.values()), materialize_grads=True)
            by_leaf = dict(zip(gates, grads, strict=True))
            found.append(torch.stack([by_leaf[leaf][:, head] for leaf, head in heads], dim=1))
        return torch.cat(found).abs().double().cpu()

    def _removals(self, subject, heads, before) -> tuple[Tensor, dict[str, Tensor]]:
        """What is important of each sample, (samples heads), and all columns, (heads,) each."""
        changes = [_changes(before, self._answers(subject, self._cut(at, heads))) for at in heads]
        columns = {name: torch.stack([change[name].mean() for change in changes]) for name in CHANGES}
        shown, sign = {"leave_one_out": ("loss", 1), "keep_one": ("loss", -1), "pruning": ("p_true", 1)}[
            self.by
        ]
        by_sample = sign * torch.stack([change[shown] for change in changes], dim=1)
        low, high, p = paired_bootstrap(by_sample, self.resamples, self.seed)
        return by_sample, columns | {"low": low, "high": high, "p": p, "importance": by_sample.mean(dim=0)}

    def _cut(self, at: tuple[Any, int], heads: Sequence[tuple[Any, int]]) -> Cut:
        """What is removed to learn of one head."""
        if self.by != "keep_one":
            return {at[0]: [at[1]]}
        return _together(other for other in heads if other[0].site == at[0].site and other != at)

    def _curve(self, subject, heads, importance: Tensor) -> dict[str, Any]:
        """Loss and accuracy while the least important heads go, a share of all at a time."""
        order, step = importance.argsort(stable=True).tolist(), max(1, round(self.curve * len(heads)))
        counts = [*range(0, len(heads), step), len(heads)]
        found = [self._answers(subject, _together(heads[i] for i in order[:count])) for count in counts]
        return {
            "removed": torch.tensor(counts).numpy() / len(heads),
            **{
                f"{name}_left": torch.tensor([_mean(one, name) for one in found]).numpy()
                for name in CHANGES[:2]
            },
        }

    def _rows(self, out: Tensor, here) -> Tensor:
        """The tokens that something is removed of, broadcasts to (b h n d)."""
        row = torch.arange(out.shape[2], device=out.device)[:, None]
        return {"all": row >= 0, "prefix": row < here.layout.prefix, "grid": row >= here.layout.prefix}[
            self.tokens
        ]

    @torch.no_grad()
    def _answers(self, subject, cut: Cut) -> list[dict[str, Tensor]]:
        """What the model says to each batch without these heads, by sample."""

        def removed(leaf, out, here):  # (b h n d)
            gone = torch.zeros(out.shape[1], dtype=torch.bool, device=out.device)
            gone[list(cut[leaf])] = True
            return out.masked_fill(gone[:, None, None] & self._rows(out, here), 0)

        answers = []
        with subject.editing("heads", removed, among=cut), _features(subject.model) as seen:
            for batch in subject.batches:
                logits = subject.call(batch)
                log_p = logits.double().log_softmax(dim=-1).reshape(len(batch), -1, logits.shape[-1])
                asked = (batch.targets != -100).reshape(len(batch), -1)
                said = {"loss": subject.losses(logits, batch), "accuracy": subject.hits(logits, batch)}
                said |= {"log_p": log_p, "asked": asked, "features": seen.pop() if seen else log_p * math.nan}
                answers.append(said)
        return answers

    def draw(self, finding: Any, figure: Any) -> None:
        """Layers × heads; where there is a curve, that: accuracy while the least important heads go."""
        if "removed" not in finding.arrays:
            return super().draw(finding, figure)
        axes = figure.subplots()
        axes.plot(100 * finding.arrays["removed"], 100 * finding.arrays["accuracy_left"], marker=".")
        axes.set(xlabel="heads removed, %", ylabel="accuracy, %", xlim=(0, 100), ylim=(0, 100))
        axes.set_title(f"least important first, by {self.by.replace('_', ' ')}")
        return None


def paired_bootstrap(
    by_sample: Tensor, resamples: int = 1000, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds of the means (95 %), and how often, on both sides, a resample has the other sign; all columns share draws.

    Args:
        by_sample: Differences of each sample, (samples columns).
        resamples: How often the samples are drawn anew, with replacement.
        seed: Of the draws.
    """
    generator, count = torch.Generator().manual_seed(seed), len(by_sample)
    draws = (torch.randint(count, (count,), generator=generator) for _ in range(resamples))
    means = torch.stack([by_sample[draw].mean(dim=0) for draw in draws])  # (resamples columns)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype), dim=0)
    tail = torch.minimum((means <= 0).sum(dim=0), (means >= 0).sum(dim=0))
    return low, high, (2 * (tail.double() + 1) / (resamples + 1)).clamp(max=1)


def _changes(before: Sequence[dict], after: Sequence[dict]) -> dict[str, Tensor]:
    """What removing heads changed, by sample, (samples,) each."""
    found: dict[str, list[Tensor]] = {name: [] for name in CHANGES}
    for was, now in zip(before, after, strict=True):
        middle = torch.logaddexp(was["log_p"], now["log_p"]) - math.log(2)

        def mean(values: Tensor, asked: Tensor = was["asked"]) -> Tensor:  # (b n) over what is asked
            return (values * asked).sum(dim=1) / asked.sum(dim=1).clamp(min=1)

        js = (_kl(was["log_p"], middle) + _kl(now["log_p"], middle)) / 2
        turned = 1 - torch.cosine_similarity(was["features"].double(), now["features"].double(), dim=-1)
        each = {
            "loss": now["loss"].double() - was["loss"],
            "accuracy": was["accuracy"].double() - now["accuracy"],
        }
        each["p_true"] = (-was["loss"].double()).exp() - (-now["loss"].double()).exp()
        each |= {"kl": mean(_kl(was["log_p"], now["log_p"])), "js": mean(js)}
        each["cosine"] = turned.reshape(len(turned), -1).mean(dim=1)
        for name, values in each.items():
            found[name].append(values.cpu())
    return {name: torch.cat(values).double() for name, values in found.items()}


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p (log p − log q) over the last axis."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp(min=0)


@contextmanager
def _features(model: Any) -> Iterator[list[Tensor]]:
    """What the classifier reads, while the block runs; nothing where no classifier is found."""
    seen: list[Tensor] = []
    head = getattr(model, "get_classifier", lambda: getattr(model, "head", None))()
    head = head[0] if isinstance(head, tuple) else head  # distilled models have two
    if head is None:
        yield seen
        return
    hook = head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()


def _together(heads: Any) -> Cut:
    """Heads by leaf."""
    cut: dict[Any, list[int]] = {}
    for leaf, head in heads:
        cut.setdefault(leaf, []).append(head)
    return cut


def _normalised(heads: Sequence[tuple[Any, int]], raw: Tensor) -> dict[str, Tensor]:
    """Each number divided by the ℓ2 norm of those at its site."""
    sites = [leaf.site for leaf, _ in heads]
    norms = {s: raw[[i for i, other in enumerate(sites) if other == s]].norm() for s in sites}
    return {"raw": raw, "importance": raw / torch.stack([norms[s] for s in sites]).clamp(min=1e-30)}


def _by_class(subject, by_sample: Tensor) -> dict[str, Any]:
    """Mean importance by true class, (heads classes), of what has one class; NaN where a class has no sample."""
    targets = torch.cat([batch.targets for batch in subject.batches]).cpu()
    if targets.ndim > 1:
        return {}
    classes = range(int(targets.max()) + 1)
    return {"by_class": torch.stack([by_sample[targets == c].mean(dim=0) for c in classes], dim=1).numpy()}


def _mean(answers: Sequence[dict], name: str) -> float:
    return float(torch.cat([answer[name].double().cpu() for answer in answers]).mean())

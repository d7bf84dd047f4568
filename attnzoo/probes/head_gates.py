"""Which heads a finished model can do without: gates with an L0 penalty.

Voita et al., "Analyzing Multi-Head Self-Attention: Specialized Heads Do the Heavy Lifting, the Rest Can Be Pruned",
2019, arXiv:1905.09418, §6.1, eqs. 7–9; the hard concrete gate of Louizos et al., 2018, arXiv:1712.01312, §2.2.
"""

import math
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from attnzoo.core import InstrumentCard, NonNegativeInt, Paper, PositiveFloat, PositiveInt, Probe
from attnzoo.lab.finding import Finding
from attnzoo.lab.gates import gated

if TYPE_CHECKING:
    from attnzoo.lab.points import Leaf
    from attnzoo.lab.subject import Subject

LOW, HIGH = -0.1, 1.1
"""What a gate is stretched to before it is clipped to 0 and 1."""
EDGE = 1e-6


@dataclass(kw_only=True, eq=False)
class HeadGates(Probe):
    """A gate g_h multiplies what each head gives, o_h; the gates alone learn: loss + λ Σ_h P(g_h ≠ 0).

    In learning g = clip(1.2 σ((log u − log(1 − u) + log α) / τ) − 0.1), u uniform, anew in each step; afterwards
    g = clip(1.2 σ(log α) − 0.1). P(g ≠ 0) = σ(log α − τ log(0.1 / 1.1)). Heads are then taken away one after the other,
    the smallest log α first (`rank` 1), and what the rest is worth is the pruning curve (`arrays`: `heads`, `loss`,
    `accuracy`). `kept` are the heads whose gate did not close.

    Gates learn on the subject's training data if it has any, a batch in each step; the curve is of its data. The model
    is left as it was: its weights do not learn, in eval mode, unlike in the paper, where they go on learning with them.

    Args:
        penalty: λ, in nats for each head.
        steps: Of Adam.
        lr: Its step size.
        start: log α of every gate at first; the smaller, the more are closed from the beginning (at 0 a gate is open
            with probability 0.69, and afterwards 0.5).
        temperature: τ.
        points: How many points of the curve at most.
        seed: Of the gates' chance.
    """

    card = InstrumentCard(
        "head_gates",
        "Which heads gates with an L0 penalty leave open, and what is lost as heads are taken away.",
        equation="min_α E_g[loss(g ⊙ o)] + λ Σ_h P(g_h ≠ 0)",
        paper=Paper(
            "Analyzing Multi-Head Self-Attention: Specialized Heads Do the Heavy Lifting, the Rest Can Be Pruned",
            "Voita et al.",
            2019,
            "arXiv:1905.09418",
            "§6.1, eqs. 7–9",
        ),
        needs={"heads", "labels"},
        fidelity="adapted",
        notes="The paper fine-tunes the model with the gates; here the model stays as it is and the gates alone learn.",
    )
    penalty: PositiveFloat = 0.02
    steps: PositiveInt = 200
    lr: PositiveFloat = 0.1
    start: float = 2.0
    temperature: PositiveFloat = 0.33
    points: PositiveInt = 25
    seed: NonNegativeInt = 0

    def measure(self, subject) -> Finding:
        leaves = subject.able("heads")
        about = [subject.about(leaf, head) for leaf in leaves for head in range(leaf.heads)]
        log_alpha, history = self._learn(subject, leaves)
        order = log_alpha.argsort()  # first who goes first
        rank = order.argsort() + 1
        gates, opened = gate(log_alpha), self.chance_open(log_alpha)
        rows = [
            about[i]
            | {"log_alpha": float(log_alpha[i]), "gate": float(gates[i]), "open": float(opened[i])}
            | {"kept": bool(gates[i] > 0), "rank": int(rank[i])}
            for i in range(len(about))
        ]
        left = np.unique(np.linspace(0, len(about), min(self.points, len(about)) + 1).round().astype(int))
        curve = [self._worth(subject, leaves, (rank > len(about) - count).float()) for count in left]
        loss, accuracy = np.array(curve).T
        gated = self._worth(subject, leaves, gates)
        return Finding.of(
            rows,
            shows="gate",
            arrays={"heads": left, "loss": loss, "accuracy": accuracy, "learning": history},
            figures={
                "heads": len(about),
                "heads_kept": sum(row["kept"] for row in rows),
                "loss": float(loss[-1]),
                "loss_gated": gated[0],
                "accuracy": float(accuracy[-1]),
                "accuracy_gated": gated[1],
            },
            notes=[] if subject.training else ["The gates learnt on the data that the curve is of."],
        )

    def chance_open(self, log_alpha: Tensor) -> Tensor:
        """P(g ≠ 0) of each gate, (h,).

        Args:
            log_alpha: (h,).
        """
        return torch.sigmoid(log_alpha - self.temperature * math.log(-LOW / HIGH)).clamp(EDGE, 1 - EDGE)

    def sampled(self, log_alpha: Tensor, generator: torch.Generator) -> Tensor:
        """A gate for each head as it is in learning, (h,).

        Args:
            log_alpha: (h,), on the CPU.
            generator: Of the CPU.
        """
        u = torch.rand(log_alpha.shape, generator=generator).clamp(EDGE, 1 - EDGE)
        return _stretched(torch.sigmoid((torch.logit(u) + log_alpha) / self.temperature))

    def _learn(self, subject: "Subject", leaves: "list[Leaf]") -> tuple[Tensor, np.ndarray]:
        """log α of each head, and in each step the loss and how many gates are open on average, (steps 2)."""
        generator = torch.Generator().manual_seed(self.seed)
        log_alpha = torch.full((sum(leaf.heads for leaf in leaves),), self.start, requires_grad=True)
        optimizer, history = torch.optim.Adam([log_alpha], lr=self.lr), []
        for batch in islice(cycle(subject.training or subject.batches), self.steps):
            with torch.enable_grad(), gated(subject, leaves, self.sampled(log_alpha, generator)):
                loss = subject.losses(subject.call(batch), batch).mean()
                opened = self.chance_open(log_alpha).sum()
                total = loss + (self.penalty * opened).to(loss)
            (log_alpha.grad,) = torch.autograd.grad(total, log_alpha)  # nothing else gets a gradient
            optimizer.step()
            history.append((float(loss.detach()), float(opened.detach())))
        return log_alpha.detach(), np.array(history)

    @torch.no_grad()
    def _worth(self, subject: "Subject", leaves: "list[Leaf]", gates: Tensor) -> tuple[float, float]:
        """Mean loss and share of right answers with these gates."""
        loss, right, count = 0.0, 0.0, 0
        with gated(subject, leaves, gates):
            for batch in subject.batches:
                output = subject.call(batch)
                loss += float(subject.losses(output, batch).sum())
                right += float(subject.hits(output, batch).sum())
                count += len(batch)
        return loss / count, right / count

    def draw(self, finding: Finding, figure: Any) -> None:
        """The pruning curve: loss and accuracy against the number of heads that are left."""
        figure.set_size_inches(5.0, 4.4)
        upper, lower = figure.subplots(2, 1, sharex=True)
        heads = finding.arrays["heads"]
        for axes, name, label in (
            (upper, "loss", "loss in nats"),
            (lower, "accuracy", "share answered rightly"),
        ):
            axes.plot(
                heads, finding.arrays[name], marker="o", markersize=3, label="heads taken away in their order"
            )
            axes.axvline(
                finding.figures["heads_kept"], color="0.6", linestyle=":", label="gates that stayed open"
            )
            axes.set_ylabel(label)
        upper.legend(fontsize="small")
        lower.set_ylim(-0.03, 1.03)
        lower.set_xlabel("heads left")
        upper.set_title("head gates")


def gate(log_alpha: Tensor) -> Tensor:
    """The gate of each head after learning, (h,), without chance.

    Args:
        log_alpha: (h,).
    """
    return _stretched(torch.sigmoid(log_alpha))


def _stretched(concrete: Tensor) -> Tensor:
    return (concrete * (HIGH - LOW) + LOW).clamp(0, 1)

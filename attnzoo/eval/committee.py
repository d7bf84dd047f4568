"""Committees: several trained models that decide together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnzoo.data import evaluation
from attnzoo.errors import ZooError
from attnzoo.hosts.given import stand_ins, taken
from attnzoo.train import Run

Vote = Literal["probability", "logit", "majority"]


@dataclass(frozen=True)
class CommitteeResult:
    """How members and committee fare.

    Args:
        vote: How they decided.
        accuracies: Of each member, as shares.
        accuracy: Of the committee, as a share.
        predictions: The committee's classes, (b).
        correlation: Of the members' errors, (k k); NaN beside a member that is always or never right.
        names: Of the members.
    """

    vote: Vote
    accuracies: tuple[float, ...]
    accuracy: float
    predictions: Int[Tensor, " b"]
    correlation: Float[Tensor, "k k"]
    names: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """Mean accuracy of the members."""
        return sum(self.accuracies) / len(self.accuracies)

    @property
    def best(self) -> float:
        """Accuracy of the best member."""
        return max(self.accuracies)

    @property
    def gain(self) -> float:
        """What deciding together adds to the mean member."""
        return self.accuracy - self.mean

    @property
    def gain_over_best(self) -> float:
        """What deciding together adds to the best member."""
        return self.accuracy - self.best

    def rows(self) -> list[list[str]]:
        """Name, accuracy and mean correlation with the other members' errors, for a table; the committee last."""
        k = len(self.accuracies)
        names = self.names or tuple(f"member {i}" for i in range(k))
        others = [self.correlation[i][torch.arange(k) != i].nanmean() for i in range(k)]
        members = [
            [name, f"{100 * accuracy:.2f} %", "" if other.isnan() else f"{float(other):.2f}"]
            for name, accuracy, other in zip(names, self.accuracies, others, strict=True)
        ]
        return [
            *members,
            ["mean member", f"{100 * self.mean:.2f} %", ""],
            [f"committee, by {self.vote}", f"{100 * self.accuracy:.2f} % ({100 * self.gain:+.2f})", ""],
        ]

    def as_dict(self) -> dict[str, Any]:
        """The result as data, for `--json`; NaN becomes None."""
        correlation = [[None if x != x else x for x in row] for row in self.correlation.tolist()]
        return {
            "vote": self.vote,
            "names": list(self.names),
            "accuracies": list(self.accuracies),
            "mean": self.mean,
            "best": self.best,
            "accuracy": self.accuracy,
            "gain": self.gain,
            "gain_over_best": self.gain_over_best,
            "correlation": correlation,
        }


def committee(
    logits: Sequence[Float[Tensor, "b c"]],
    labels: Int[Tensor, " b"],
    vote: Vote = "probability",
    standardise: bool = False,
    names: Sequence[str] = (),
) -> CommitteeResult:
    """Decide together.

    `probability`: the class with the largest mean softmax. `logit`: the largest sum of logits, so that a member with
    larger logits has more say. `majority`: most votes; mean softmax decides among equals.

    Args:
        logits: Of each member, (b c) each.
        labels: True classes (b).
        vote: How the members decide.
        standardise: Whether each member's logits are first brought to mean 0 per image and variance 1 overall.
        names: Of the members.

    Raises:
        ZooError: AZ906, when there is no member or they do not answer the same question.
    """
    shapes = {tuple(one.shape) for one in logits}
    if len(shapes) != 1 or labels.shape != next(iter(shapes))[:1]:
        shown = ", ".join(" x ".join(map(str, shape)) for shape in sorted(shapes)) or "none"
        raise ZooError(
            "AZ906",
            f"these cannot be a committee: answers {shown} for {len(labels)} labels",
            why="every member answers for the same images and the same classes",
            help="take runs that were trained on the same data",
        )
    z = torch.stack(list(logits)).double()  # (k b c)
    if standardise:
        z = z - z.mean(dim=-1, keepdim=True)
        spread = z.square().mean(dim=(1, 2), keepdim=True).sqrt()
        z = z / torch.where(spread > 0, spread, 1.0)
    share = z.softmax(dim=-1)
    own = z.argmax(dim=-1)  # (k b)
    votes = {
        "probability": share.mean(dim=0),
        "logit": z.sum(dim=0),
        "majority": torch.nn.functional.one_hot(own, z.shape[-1]).sum(dim=0) + share.mean(dim=0) / 2,
    }[vote]
    predictions = votes.argmax(dim=-1)
    errors = (own != labels).double()
    return CommitteeResult(
        vote=vote,
        accuracies=tuple((1 - errors.mean(dim=1)).tolist()),
        accuracy=float((predictions == labels).double().mean()),
        predictions=predictions,
        correlation=_correlation(errors),
        names=tuple(names),
    )


def _correlation(errors: Float[Tensor, "k b"]) -> Float[Tensor, "k k"]:
    centred = errors - errors.mean(dim=1, keepdim=True)
    length = centred.norm(dim=1)
    return (centred @ centred.T) / (length[:, None] * length)  # 0 / 0 = NaN where a member never changes


@torch.no_grad()
def evaluate_committee(
    runs: Sequence[Run],
    which: Literal["best", "last"] = "best",
    vote: Vote = "probability",
    standardise: bool = False,
    batch: int = 256,
) -> CommitteeResult:
    """A committee of trained runs on the test images of their data.

    Args:
        runs: From `open_run`; all on the same data.
        which: Weights of the best or of the last epoch.
        vote: How the members decide.
        standardise: Whether each member's logits are first brought to one scale.
        batch: Images per forward.

    Raises:
        ZooError: AZ906, when there is no run or they were trained on different data.
    """
    answers, truths = [], []
    for run in runs:
        model, data = run.model(which), run.data()
        prepare = evaluation(data.image, data.mean, data.std)
        device = next(model.parameters()).device
        logits, labels = [], []
        for indices in torch.arange(len(data.test)).split(batch):
            images, truth = data.test.batch(indices)
            x = prepare(images).to(device)
            logits.append(model(x, **stand_ins(x, taken(model))).cpu())
            labels.append(truth)
        answers.append(torch.cat(logits))
        truths.append(torch.cat(labels))
    if not runs or any(not torch.equal(truth, truths[0]) for truth in truths):
        raise ZooError(
            "AZ906",
            "these runs cannot be a committee" if runs else "a committee needs runs",
            why="every member answers for the same images and the same classes",
            help="take runs that were trained on the same data",
        )
    return committee(answers, truths[0], vote, standardise, [run.folder.name for run in runs])

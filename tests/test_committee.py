"""Models that decide together: invariants, hand cases, and runs."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attnzoo.errors import ZooError
from attnzoo.eval.committee import committee, evaluate_committee

VOTES = ("probability", "logit", "majority")


def answers(members: int, images: int = 200, classes: int = 5) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits of members that are right more often than not, and labels."""
    labels = torch.randint(classes, (images,))
    truth = nn.functional.one_hot(labels, classes)
    return [2 * truth + 1.5 * torch.randn(images, classes) for _ in range(members)], labels


@pytest.mark.parametrize("vote", VOTES)
@pytest.mark.parametrize("standardise", [False, True])
def test_one_member_decides_as_it_does(vote, standardise):
    (logits,), labels = answers(1)
    found = committee([logits], labels, vote, standardise)
    assert torch.equal(found.predictions, logits.argmax(dim=-1))
    assert found.accuracy == found.mean == found.best and found.gain == 0


@pytest.mark.parametrize("vote", VOTES)
def test_equal_members_gain_nothing(vote):
    (logits,), labels = answers(1)
    found = committee([logits] * 3, labels, vote)
    assert found.gain == pytest.approx(0) and found.gain_over_best == pytest.approx(0)
    torch.testing.assert_close(found.correlation, torch.ones(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("vote", VOTES)
def test_the_order_of_members_does_not_matter(vote):
    logits, labels = answers(4)
    one, other = committee(logits, labels, vote), committee(logits[::-1], labels, vote)
    assert torch.equal(one.predictions, other.predictions)
    assert one.accuracies == other.accuracies[::-1]
    torch.testing.assert_close(one.correlation, other.correlation.flip(0, 1))


@pytest.mark.parametrize("vote", VOTES)
def test_independent_members_gain(vote):
    logits, labels = answers(5, images=2000)
    found = committee(logits, labels, vote)
    assert found.gain > 0.05 and found.gain_over_best > 0.05
    others = found.correlation[~torch.eye(5, dtype=torch.bool)]
    assert others.abs().max() < 0.1


def test_only_plain_logits_depend_on_their_scale():
    logits, labels = answers(2)
    loud = [100 * logits[0], logits[1]]
    assert not torch.equal(
        committee(loud, labels, "logit").predictions, committee(logits, labels, "logit").predictions
    )
    for vote in VOTES:
        even, uneven = (committee(z, labels, vote, standardise=True).predictions for z in (logits, loud))
        assert torch.equal(even, uneven)
    agree = (committee(loud, labels, "logit").predictions == logits[0].argmax(dim=-1)).double().mean()
    assert agree > 0.95


def test_votes_by_hand():
    """Two members slightly for class 0, one strongly for class 1."""
    mild, strong = torch.tensor([[0.2, 0.0]]), torch.tensor([[-5.0, 5.0]])
    labels = torch.tensor([0])
    found = {vote: int(committee([mild, mild, strong], labels, vote).predictions) for vote in VOTES}
    assert found == {"probability": 1, "logit": 1, "majority": 0}
    tie = committee([mild, strong], labels, "majority")
    assert tie.predictions.tolist() == [1]  # one vote each: mean softmax decides


def test_figures_by_hand():
    labels = torch.tensor([0, 0, 1, 1])
    right = torch.tensor([[3.0, 0], [3, 0], [0, 3], [0, 3]])
    half = torch.tensor([[3.0, 0], [0, 3], [0, 3], [3, 0]])
    other = torch.tensor([[0.0, 3], [3, 0], [3, 0], [0, 3]])
    found = committee([half, other, right], labels, names=["a", "b", "c"])
    assert found.accuracies == (0.5, 0.5, 1.0) and found.best == 1 and found.accuracy == 1
    assert (
        found.mean == pytest.approx(2 / 3)
        and found.gain == pytest.approx(1 / 3)
        and found.gain_over_best == 0
    )
    assert found.correlation[0, 1] == pytest.approx(-1) and found.correlation[0, 2].isnan()
    assert found.rows()[0] == ["a", "50.00 %", "-1.00"] and found.rows()[2] == ["c", "100.00 %", ""]
    assert found.rows()[-1] == ["committee, by probability", "100.00 % (+33.33)", ""]
    assert found.as_dict()["correlation"][2] == [None, None, None]


@pytest.mark.parametrize(
    "logits",
    [[], [torch.zeros(4, 2), torch.zeros(4, 3)], [torch.zeros(3, 2)]],
    ids=["none", "classes", "labels"],
)
def test_who_cannot_sit_together(logits):
    with pytest.raises(ZooError) as caught:
        committee(logits, torch.zeros(4, dtype=torch.long))
    assert caught.value.code == "AZ906"


@dataclass(frozen=True)
class Images:
    """Test images of one grey each; the class is whether it is bright."""

    greys: torch.Tensor

    def __len__(self):
        return len(self.greys)

    def batch(self, indices):
        assert len(indices) <= 3
        return self.greys[indices][:, None, None, None].expand(-1, 1, 2, 2), (
            self.greys[indices] > 127
        ).long()


class Bright(nn.Module):
    """Bright or not, by a threshold of its own."""

    def __init__(self, threshold: float):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, images):
        over = images.mean(dim=(1, 2, 3)) - self.threshold
        return torch.stack([-over, over], dim=1)


@dataclass(frozen=True)
class Run:
    """As `attnzoo.train.open_run` gives it."""

    threshold: float
    greys: torch.Tensor

    @property
    def folder(self):
        return Path(f"runs/over {self.threshold}")

    def model(self, which):
        return Bright(self.threshold if which == "best" else -9.0)

    def data(self):
        return SimpleNamespace(
            test=Images(self.greys), image=(1, 2, 2), mean=(0.0,), std=(1.0,), classes=("dark", "bright")
        )


def test_runs_are_evaluated_on_their_test_images():
    greys = torch.tensor([0, 100, 110, 120, 130, 140, 200, 255], dtype=torch.uint8)
    runs = [Run(0.41, greys), Run(0.53, greys)]
    found = evaluate_committee(runs, batch=3)
    assert found.accuracies == (6 / 8, 7 / 8) and found.names == ("over 0.41", "over 0.53")
    assert evaluate_committee(runs, which="last", batch=3).mean == 0.5  # all bright: another model
    with pytest.raises(ZooError) as caught:
        evaluate_committee([runs[0], replace(runs[1], greys=greys.flip(0))], batch=3)
    assert caught.value.code == "AZ906"
    with pytest.raises(ZooError):
        evaluate_committee([])

"""What users of attnzoo write. mypy --strict has nothing to say about it (tests/test_release.py); nobody runs it."""

from pathlib import Path

import torch
from torch import Tensor, nn

import attnzoo
from attnzoo import Card, Family, Head, Law, Layout, Mask, Mechanism, Paper, PositiveFloat, Site, hookimpl
from attnzoo.testing import against

model: nn.Module = attnzoo.compose("digits_softmax", num_classes=10)
layer = attnzoo.create("agent", dim=64, heads=4, grid=(8, 8))
mha = attnzoo.as_mha("softmax", 64, 4)
fast: nn.Module = attnzoo.accelerate(model)
names: list[str] = list(attnzoo.list_mechanisms("*lin*", mask="causal"))
shown: list[str] = [str(attnzoo.show("softmax")), str(attnzoo.describe(model)), *names]
difference = attnzoo.diff("ham_a", "ham_b")
params: tuple[int, int] = difference.params
images: Tensor = torch.randn(2, 3, 32, 32)
found = attnzoo.probe(model, "entropy", inputs=images)
found.figure().savefig("entropy.png")
with attnzoo.intervene(model, "temperature(value=2.0)"):
    out: Tensor = model(images)
with attnzoo.auxiliary_losses(model) as losses:
    total: Tensor = out.sum() + torch.stack(list(losses.by_component().values())).sum()
grafted, ledger = attnzoo.graft(model, "ham_b")
zoo = attnzoo.load_zoo()
family: Family = zoo.mechanisms["softmax"].value.card.family
plain = attnzoo.ungraft(grafted)
try:
    attnzoo.compose(Path("nowhere.yaml"))
except attnzoo.ZooError as error:
    code: str = error.code


class Cooler(Head):
    """softmax(q kᵀ / (t √d)) v.

    Args:
        site: Where the head is put.
        t: The temperature.
    """

    card = Card(
        "cooler",
        Family.DOT_PRODUCT,
        "Softmax at a temperature.",
        paper=Paper("None", "Nobody"),
        masks={"keys"},
        context=True,
        taps={"weights": "b h n m"},
        laws={Law.STOCHASTIC},
    )

    def __init__(self, site: Site, *, t: PositiveFloat = 1.0) -> None:
        super().__init__(site)
        self.t = t

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, layout: Layout) -> Tensor:
        scores = q @ k.mT / (self.t * q.shape[-1] ** 0.5)
        if mask.keys is not None:
            scores = scores.masked_fill(~mask.keys[:, None, None, :], -torch.inf)
        weights: Tensor = self.weights(scores.softmax(dim=-1))
        return weights @ v


@hookimpl
def attnzoo_mechanisms() -> list[type[Mechanism] | type[Head]]:
    return [Cooler]


built: Head = Cooler(Site("blocks.0", 64, 4, Layout((8, 8))))
name: str = built.card.name


@against(Cooler)
def test_cooler(component: Cooler, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    scores = (q @ k.mT / (component.t * q.shape[-1] ** 0.5)).masked_fill(~allowed, -torch.inf)
    out: Tensor = scores.softmax(dim=-1).nan_to_num() @ v
    return out

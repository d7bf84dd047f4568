"""What probes measure: a model, data for it, and ways to look at both."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.core import Intervention, Layout
from attnzoo.core.intervention import Here
from attnzoo.data import evaluation
from attnzoo.data.chance import drawn
from attnzoo.data.vocabulary import PAD
from attnzoo.errors import ZooError
from attnzoo.hosts.given import stand_ins, taken
from attnzoo.lab.intervening import OF_HEADS, intervene
from attnzoo.lab.maps import Looked, Map, look
from attnzoo.lab.points import Leaf, attach, leaves
from attnzoo.lab.sites import sites_of

Kind = Literal["images", "pairs", "sequences"]
IGNORE = -100
"""A target that is not asked."""
AT_ONCE = 64
"""Examples of a batch."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs of one forward, and what should come out.

    Args:
        inputs: What the model is called with.
        targets: True classes (b,), or true tokens (b n) with -100 where none is asked; None when not known.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs[0])


@dataclass(eq=False)
class Subject:
    """A model and data for it. The model is in eval mode, and left as it was.

    Args:
        model: A composed model, or one of timm's inside of `tapped`.
        batches: Data, batch by batch.
        kind: What it is given: `images`, `pairs` of sequences, or `sequences`.
        classes: Names of its classes, where it has any.
        name: What it is called.
        training: What it was trained on, for probes that fit something of their own; they fit to `batches` when empty.
    """

    model: nn.Module
    batches: Sequence[Batch]
    kind: Kind = "images"
    classes: Sequence[str] | None = None
    name: str = "model"
    training: Sequence[Batch] = ()
    leaves: list[Leaf] = field(init=False)
    sites: Mapping[str, nn.Module] = field(init=False)

    def __post_init__(self):
        self.leaves, self.sites = leaves(self.model), sites_of(self.model)
        several = {site for site in self.sites if sum(leaf.site == site for leaf in self.leaves) > 1}
        self._several = several

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Tensor | tuple[Tensor, ...],
        targets: Tensor | None = None,
        *,
        batch_size: int = 64,
        kind: Kind = "images",
        **more: Any,
    ) -> "Subject":
        """A subject of tensors, cut into batches.

        Args:
            model: It.
            inputs: What it is called with: images (b c y x), or ids (b n), or several.
            targets: True classes (b,) or tokens (b n).
            batch_size: How many at once.
            kind: What the inputs are.
            more: `classes`, `name`, `training`.
        """
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        cut = [part.split(batch_size) for part in inputs]
        wanted = targets.split(batch_size) if targets is not None else [None] * len(cut[0])
        pieces = zip(zip(*cut, strict=True), wanted, strict=True)
        return cls(model, [Batch(tuple(part), true) for part, true in pieces], kind, **more)

    @classmethod
    def of_run(
        cls, run: Any, which: str = "best", count: int = 256, seed: int = 0, data: str | None = None
    ) -> "Subject":
        """The model of a run and examples of its test side, drawn at random; as many of its training side.

        Args:
            run: An `attnzoo.train.Run`.
            which: Weights of the `best` or the `last` epoch.
            count: Most examples of each side.
            seed: Of the draw.
            data: Other data of the same kind.
        """
        name = run.folder.resolve().name
        return cls.of_data(run.model(which), run.data(data), run.kind, count=count, seed=seed, name=name)

    @classmethod
    def of_data(
        cls,
        model: nn.Module,
        data: Any,
        kind: Kind,
        *,
        count: int = 256,
        seed: int = 0,
        name: str = "model",
        labelled: bool = True,
    ) -> "Subject":
        """A model and examples of the test side of a data set, drawn at random; as many of its training side.

        Args:
            model: It.
            data: `ImageData`, `PairData` or `SequenceData`, as the model knows it.
            kind: Which of them.
            count: Most examples of each side.
            seed: Of the draw.
            name: What the model is called.
            labelled: Whether their classes are those of the model.
        """
        cut = {"images": _images, "pairs": _pairs, "sequences": _sequences}[kind]
        sides = [cut(data, side, drawn(len(side), count, seed)) for side in (data.test, data.train)]
        if not labelled:
            sides = [[Batch(batch.inputs) for batch in side] for side in sides]
        classes = getattr(data, "classes", None) if labelled else None
        return cls(model, sides[0], kind, classes, name, sides[1])

    def about(self, leaf: Leaf, head: int | None = None) -> dict[str, Any]:
        """The first columns of a row about a leaf: layer, site, branch (empty where there is one only), head.

        Args:
            leaf: It.
            head: Which of its heads; None for a row about all.
        """
        branch = leaf.branch if leaf.site in self._several else ""
        about = {"layer": leaf.layer, "site": leaf.site, "branch": branch}
        return about if head is None else about | {"head": head}

    def heads(self, *needs: str) -> list[tuple[Leaf, int]]:
        """Every head of the leaves that can be edited there, in order.

        Args:
            needs: Kinds of edits: `weights`, `heads`.

        Raises:
            ZooError: AZ924, when no leaf can.
        """
        able = self.able(*needs)
        return [(leaf, head) for leaf in able for head in range(leaf.heads)]

    def able(self, *needs: str) -> list[Leaf]:
        """The leaves that can be edited there.

        Args:
            needs: Kinds of edits: `weights`, `heads`.

        Raises:
            ZooError: AZ924, when there is none.
        """
        able = [leaf for leaf in self.leaves if not any(leaf.lacks(kind) for kind in needs)]
        if not able:
            reasons = dict.fromkeys(
                leaf.lacks(kind) for leaf in self.leaves for kind in needs if leaf.lacks(kind)
            )
            raise ZooError(
                "AZ924",
                f"there is nothing to be measured in `{self.name}`",
                why="; ".join(reasons),
                help="`attnzoo show NAME` says what a mechanism lets see",
            )
        return able

    def call(self, batch: Batch) -> Tensor:
        """What the model answers to a batch, in eval mode."""
        was = self.model.training
        try:
            return self.model.eval()(*batch.inputs, **self.given(batch))
        finally:
            self.model.train(was)

    def given(self, batch: Batch) -> Mapping[str, Tensor]:
        """What the model takes beside images, by name, made of the images."""
        return stand_ins(batch.inputs[0], taken(self.model)) if self.kind == "images" else {}

    @torch.no_grad()
    def outputs(self, *interventions: Intervention | str) -> list[Tensor]:
        """What the model answers to every batch, with these interventions.

        Args:
            interventions: As `intervene` takes them.
        """
        with intervene(self.model, *interventions):
            return [self.call(batch) for batch in self.batches]

    def seen(self) -> Iterator[tuple[Batch, Looked]]:
        """Every batch with the maps of all leaves in it."""
        for batch in self.batches:
            yield batch, look(self.model, self.sites, batch.inputs, self.given(batch))

    def maps(self) -> Iterator[tuple[Batch, list[tuple[Leaf, Map, Layout]]]]:
        """Every batch with the maps of the leaves that have one, and how their keys are arranged.

        Raises:
            ZooError: AZ924, when no leaf has one.
        """
        by_name = {(leaf.site, leaf.branch): leaf for leaf in self.leaves}
        for batch, looked in self.seen():
            pairs = zip(looked.read, looked.layouts, strict=True)
            found = [(by_name[one.site, one.branch], one, at) for one, at in pairs if isinstance(one, Map)]
            if not found:
                raise ZooError(
                    "AZ924",
                    f"no mechanism of `{self.name}` has an attention map",
                    why="; ".join(dict.fromkeys(f"`{one.mechanism}`: {one.reason}" for one in looked.absent)),
                    help="`attnzoo show NAME` says whether a mechanism forms weights",
                )
            yield batch, found

    @contextmanager
    def editing(
        self,
        kind: str,
        edit: Callable[[Leaf, Tensor, Here], Tensor | None],
        among: Iterable[Leaf] | None = None,
    ) -> Iterator[None]:
        """Look at, or replace, what passes by at every leaf while the block runs.

        Args:
            kind: Where: one of `EDITS`.
            edit: Called with the leaf, the tensor and what is known there.
            among: These leaves only; all that can be edited there when None.
        """
        chosen = list(among) if among is not None else [x for x in self.able(kind) if self._passes(x, kind)]
        edits = {leaf: {kind: lambda t, here, leaf=leaf: edit(leaf, t, here)} for leaf in chosen}
        with attach(self.model, edits):
            yield

    def _passes(self, leaf: Leaf, kind: str) -> bool:
        """Whether it is looked at there: of what is around all branches of a site, at the first alone."""
        first = next(one for one in self.leaves if one.site == leaf.site)
        return not leaf.lacks(kind) and (leaf is first or kind in OF_HEADS)

    @torch.no_grad()
    def recorded(self, *kinds: str) -> Iterator[tuple[Batch, dict[tuple[str, Leaf], Tensor], Tensor]]:
        """Every batch with what passed by at every leaf, by kind and leaf, and what the model answered.

        Args:
            kinds: Where: of `EDITS`. Leaves that cannot be looked at there are left out.
        """
        found: dict[tuple[str, Leaf], Tensor] = {}

        def keep(kind: str, leaf: Leaf) -> Callable[[Tensor, Here], None]:
            def note(tensor: Tensor, here: Here) -> None:
                found[kind, leaf] = tensor

            return note

        edits = {leaf: {k: keep(k, leaf) for k in kinds if self._passes(leaf, k)} for leaf in self.leaves}
        for batch in self.batches:
            with attach(self.model, edits):
                output = self.call(batch)
            yield batch, dict(found), output
            found.clear()

    def losses(self, output: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of each sample, in nats, (b,), or squared error of numbers; the mean over what is asked.

        Args:
            output: Logits (b classes) or (b n words).
            batch: With targets.

        Raises:
            ZooError: AZ926, when the batch has no targets.
        """
        targets = self._known(batch)
        if targets.is_floating_point():
            there = ~targets.isnan()
            errors = torch.where(there, output - targets.nan_to_num(), 0.0).square().flatten(1)
            return errors.sum(dim=1) / there.flatten(1).sum(dim=1).clamp(min=1)
        logits = output.float().flatten(0, -2)
        each = F.cross_entropy(logits, targets.flatten(), reduction="none", ignore_index=IGNORE)
        asked = (targets != IGNORE).reshape(len(batch), -1)
        return (each.view(len(batch), -1) * asked).sum(dim=1) / asked.sum(dim=1).clamp(min=1)

    def shares(self, output: Tensor, batch: Batch) -> Tensor:
        """Probability of what is true, by sample, (b,): of sequences e to the mean log-probability."""
        return (-self.losses(output, batch)).exp()

    def hits(self, output: Tensor, batch: Batch) -> Tensor:
        """Share of what is asked that is answered rightly, by sample, (b,)."""
        targets = self.targets(batch)
        asked = (targets != IGNORE).reshape(len(batch), -1)
        right = (output.argmax(dim=-1) == targets).reshape(len(batch), -1) & asked
        return right.sum(dim=1) / asked.sum(dim=1).clamp(min=1)

    def targets(self, batch: Batch) -> Tensor:
        """The targets of a batch.

        Raises:
            ZooError: AZ926, when there are none; AZ927, when they are no classes.
        """
        targets = self._known(batch)
        if targets.is_floating_point():
            raise ZooError(
                "AZ927",
                f"the targets of `{self.name}` are values of {targets.dtype}, not classes",
                help="hand over whole numbers, the index of the true class or token",
            )
        return targets

    def _known(self, batch: Batch) -> Tensor:
        """The targets of a batch, classes or numbers.

        Raises:
            ZooError: AZ926, when there are none.
        """
        if batch.targets is None:
            raise ZooError(
                "AZ926",
                "the true classes are needed, and are not known",
                help="hand over targets: Subject.of(model, images, labels); on the command line name a run, or --data",
            )
        return batch.targets

    @property
    def layout(self) -> Layout:
        """How the tokens of images are arranged."""
        return next(iter(self.seen()))[1].layouts[0]


def _images(data: Any, side: Any, chosen: Sequence[int]) -> list[Batch]:
    transform = evaluation(data.image, data.mean, data.std)
    parts = (side.batch(indices) for indices in torch.tensor(chosen).split(AT_ONCE))
    # grey images in as many channels as the model takes
    return [Batch((transform(images.expand(-1, data.image[0], -1, -1)),), labels) for images, labels in parts]


def _pairs(data: Any, side: Any, chosen: Sequence[int]) -> list[Batch]:
    """One pair each, so that nothing is padding."""
    parts = (side.batch(torch.tensor([index])) for index in chosen)
    return [Batch((source, target[:, :-1]), asked(target[:, 1:])) for source, target in parts]


def asked(targets: Tensor) -> Tensor:
    """Targets of pairs, with -100 where nothing is asked."""
    return targets.masked_fill(targets == PAD, IGNORE)


def _sequences(data: Any, side: Any, chosen: Sequence[int]) -> list[Batch]:
    parts = (side.batch(indices) for indices in torch.tensor(chosen).split(AT_ONCE))
    return [Batch((inputs,), targets) for inputs, targets in parts]

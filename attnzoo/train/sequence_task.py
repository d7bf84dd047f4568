"""Single sequences: a class or numbers are asked at some positions."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from attnzoo.data.sequences import IGNORE, SequenceData
from attnzoo.errors import RunError
from attnzoo.recipe import Loaded
from attnzoo.recipe.schema import SequenceHost
from attnzoo.train.pair_task import token_losses
from attnzoo.train.settings import Settings, completed
from attnzoo.train.task import Inputs, Task

CHUNK = 1024
"""Sequences that are counted at once."""


class SequenceTask(Task):
    """Cross-entropy where a class is asked, the squared error where numbers are; each that is asked is a unit.

    Args:
        loaded: The recipe.
        settings: How to train.
        data: The sequences.

    Raises:
        RunError: AZ806, when labels shall be smoothed and there are none; AZ814, when the model sees the answers.
    """

    kind = "sequences"
    data: SequenceData

    def __init__(self, loaded: Loaded, settings: Settings, data: SequenceData):
        super().__init__(loaded, settings, data)
        if data.regression and settings.label_smoothing:
            raise RunError(
                "AZ806",
                f"`{data.name}` asks for numbers; there are no labels to smooth",
                help="use --set train.label_smoothing=0",
            )
        chunks = torch.arange(len(data.train)).split(CHUNK)
        self.asked = torch.cat([asked(data.train.batch(chunk)[1]).flatten(1).sum(dim=1) for chunk in chunks])

    @property
    def notes(self) -> tuple[str, ...]:
        """How the sequences were made."""
        return self.data.notes

    def fit(self, loaded: Loaded) -> Loaded:
        """The recipe with what comes in (`host.vocab` or `host.width`), what goes out (`host.outputs`) and the length.

        A `host.max_length` that the recipe says stays if it is long enough.
        """
        data, host = self.data, cast(SequenceHost, loaded.recipe.host)
        if data.causal and not host.causal:
            raise RunError(
                "AZ814",
                f"`{loaded.name}` would see the answers of `{data.name}`",
                why="they stand further on in the sequence, and its host is not causal",
                help="use --set host.causal=true",
            )
        if loaded.recipe.pool is not None:
            raise RunError(
                "AZ814",
                f"`{loaded.name}` gives one answer for the whole sequence",
                why=f"`{data.name}` asks at single positions",
                help="leave the pool out: --set pool=null",
            )
        length = max(host.max_length, data.length) if "max_length" in host.model_fields_set else data.length
        wanted = {
            "vocab": data.vocab or 0,
            "width": data.width or 0,
            "outputs": data.outputs,
            "max_length": length,
        }
        edits = [f"host.{key}={value}" for key, value in wanted.items() if getattr(host, key) != value]
        return completed(loaded, self.settings, edits)

    def facts(self) -> dict[str, Any]:
        """`words`: a name for each token, or null."""
        return {"words": list(self.data.words) if self.data.words else None}

    def prepare(self, epoch: int, indices: Tensor) -> tuple[Inputs, Tensor]:
        """Tokens (b n) or vectors (b n e); classes (b n) or numbers (b n o)."""
        inputs, targets = self.data.train.batch(indices)
        return (inputs,), targets

    def units(self, indices: Tensor) -> int:
        """Classes or numbers that are asked."""
        return int(self.asked[indices].sum())

    def losses(self, model: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
        """Cross-entropy, in nats, or squared error, summed over what is asked in each sequence, (b,)."""
        outputs = model(*inputs).float()
        if self.data.regression:
            return squared_errors(outputs, targets).flatten(1).sum(dim=1)
        return token_losses(outputs, targets, IGNORE, self.settings.label_smoothing).sum(dim=1)

    @torch.no_grad()
    def tally(
        self, model: nn.Module, *, device: torch.device | str = "cpu", rank: int = 0, world: int = 1
    ) -> Tensor:
        """Of classes, of all and then of each subtask: how many are asked, how many are right, their summed loss,
        (k 3). Of numbers, for each output: how many are asked, the sums of squared errors, of the numbers, and of their
        squares, (o 4)."""
        was_training = model.training
        model.eval()
        side, data = self.data.test, self.data
        shape = (data.outputs, 4) if data.regression else (1 + len(data.kinds), 3)
        sums = torch.zeros(shape, dtype=torch.float64)
        at_once = max(1, self.settings.batch_size // self.settings.accumulate)
        for indices in torch.arange(rank, len(side), world).split(at_once):
            inputs, targets = (tensor.to(device) for tensor in side.batch(indices))
            outputs = model(inputs).float()
            if data.regression:
                numbers = targets.nan_to_num().double()
                each = [asked(targets), squared_errors(outputs, targets), numbers, numbers.square()]
                sums += torch.stack([one.flatten(0, 1).double().sum(dim=0) for one in each], dim=-1).cpu()
            else:
                right = outputs.argmax(dim=-1) == targets  # never where nothing is asked
                each = [asked(targets), right, token_losses(outputs, targets, IGNORE)]
                found = torch.stack([one.double() for one in each], dim=-1).cpu()  # (b n 3)
                sums[0] += found.sum(dim=(0, 1))
                if side.kinds is not None:
                    for i in range(len(data.kinds)):
                        sums[1 + i] += found[side.kinds[indices] == i].sum(dim=0)
        model.train(was_training)
        return sums

    def figures(self, tally: Tensor) -> dict[str, float]:
        """`test_loss`, mean cross-entropy, in nats, or mean squared error; `test_accuracy`, the share that is right, or
        R² = 1 - Σ(y - ŷ)² / Σ(y - ȳ)², the share of variance that is explained, with ȳ the mean of each output. For
        each subtask `test_NAME`, the share that is right there."""
        if not self.data.regression:
            shares = (tally[:, 1] / tally[:, 0].clamp(min=1)).tolist()
            loss = float(tally[0, 2] / tally[0, 0].clamp(min=1))
            names = ("accuracy", *self.data.kinds)
            return {"test_loss": loss} | {f"test_{n}": share for n, share in zip(names, shares, strict=True)}
        count, errors, numbers, squares = tally.unbind(dim=1)
        variance = float((squares - numbers.square() / count.clamp(min=1)).sum())
        total = float(errors.sum())
        explained = 1 - total / variance if variance > 0 else float(total == 0)
        return {"test_loss": total / max(1.0, float(count.sum())), "test_accuracy": explained}


def asked(targets: Tensor) -> Tensor:
    """Where something is asked, in the shape of the targets.

    Args:
        targets: Classes, IGNORE where none is asked; or numbers, NaN where none is.
    """
    return ~targets.isnan() if targets.is_floating_point() else targets != IGNORE


def squared_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """(y - ŷ)², (b n o); 0 where nothing is asked, and no gradient there.

    Args:
        outputs: (b n o).
        targets: (b n o), NaN where nothing is asked.
    """
    wanted = asked(targets)
    return torch.where(wanted, outputs - targets.nan_to_num(), 0.0).square()

"""Pairs of sequences: a model that translates learns each target token from the source and the tokens before it."""

import json
from functools import lru_cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.data.pairs import PairData
from attnzoo.data.vocabulary import PAD
from attnzoo.errors import RunError
from attnzoo.recipe import Loaded
from attnzoo.recipe.schema import Seq2SeqHost
from attnzoo.train import sampler
from attnzoo.train.settings import Settings, completed
from attnzoo.train.task import Inputs, Task


class PairTask(Task):
    """Teacher forcing: the model is given bos … and learns … eos. A unit is a target token; padding counts nowhere.

    Batches hold pairs of about the same length (`sampler.bucketed`).

    Args:
        loaded: The recipe.
        settings: How to train.
        data: The pairs.

    Raises:
        RunError: AZ814, when the recipe ties what cannot be tied.
    """

    kind = "pairs"
    data: PairData

    def __init__(self, loaded: Loaded, settings: Settings, data: PairData):
        super().__init__(loaded, settings, data)
        lengths = data.train.lengths
        self.tokens = lengths[:, 1] - 1  # bos is given, not asked
        self._batches = lru_cache(maxsize=2)(
            partial(sampler.bucketed, lengths.sum(dim=1), settings.batch_size, seed=settings.seed)
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """How the pairs were made."""
        return self.data.notes

    def fit(self, loaded: Loaded) -> Loaded:
        """The recipe with the sizes of the vocabularies, and the length of strings that are longer than it says."""
        data, host = self.data, cast(Seq2SeqHost, loaded.recipe.host)
        if host.tie == "all" and len(self.vocabularies()) == 2:
            raise RunError(
                "AZ814",
                f"`{loaded.name}` ties the embeddings of both sides, which need one vocabulary",
                why=f"`{data.name}` has one for each side",
                help="use --set train.tokens.shared=true or --set host.tie=target",
            )
        longest = max(int(side.lengths.max()) for side in (data.train, data.test) if len(side))
        said, sizes = host.model_dump(), {"source": data.source.size, "target": data.target.size}
        wanted = {
            "vocab": sizes if len(self.vocabularies()) == 2 else data.source.size,
            "max_length": max(host.max_length, longest),
        }
        edits = [f"host.{key}={json.dumps(value)}" for key, value in wanted.items() if said[key] != value]
        return completed(loaded, self.settings, edits)

    def vocabularies(self) -> list[dict[str, Any]]:
        """Of the sources and of the targets, as data; one when they share it."""
        both = [self.data.source.as_data(), self.data.target.as_data()]
        return both[:1] if both[0] == both[1] else both

    def facts(self) -> dict[str, Any]:
        """`vocabularies`: with them a run translates when its data are gone."""
        return {"vocabularies": self.vocabularies()}

    def batch(self, epoch: int, step: int) -> Tensor:
        """The pairs of a step, over all processes, (b,)."""
        return self._batches(epoch=epoch)[step]

    def prepare(self, epoch: int, indices: Tensor) -> tuple[Inputs, Tensor]:
        """Source (b n) and target without its last token (b m); the target without its first (b m). Padded with 0."""
        source, target = self.data.train.batch(indices)
        return (source, target[:, :-1]), target[:, 1:]

    def units(self, indices: Tensor) -> int:
        """Target tokens, with eos."""
        return int(self.tokens[indices].sum())

    def losses(self, model: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
        """Cross-entropy summed over the target tokens of each pair, (b,), in nats."""
        return token_losses(model(*inputs), targets, PAD, self.settings.label_smoothing).sum(dim=1)

    @torch.no_grad()
    def tally(
        self, model: nn.Module, *, device: torch.device | str = "cpu", rank: int = 0, world: int = 1
    ) -> Tensor:
        """Target tokens, how many are right, their summed loss, pairs, and how many are right in every token, (5)."""
        was_training = model.training
        model.eval()
        sums, side = torch.zeros(5, dtype=torch.float64), self.data.test
        at_once = max(1, self.settings.batch_size // self.settings.accumulate)
        for indices in side.lengths.sum(dim=1).argsort(stable=True)[rank::world].split(at_once):
            source, target = (tensor.to(device) for tensor in side.batch(indices))
            given, targets = target[:, :-1], target[:, 1:]
            logits, asked = model(source, given), targets != PAD
            right = (logits.argmax(dim=-1) == targets) & asked
            loss = token_losses(logits, targets, PAD).double().sum()
            exact = (right | ~asked).all(dim=1).sum()
            sums += torch.stack([asked.sum(), right.sum(), loss, exact.new_tensor(len(indices)), exact]).cpu()
        model.train(was_training)
        return sums

    def figures(self, tally: Tensor) -> dict[str, float]:
        """`test_loss`, per target token, in nats; `test_accuracy`, the share of target tokens that are right given the
        right ones before; `test_exact`, the share of pairs that are right throughout, as greedy decoding gives them."""
        tokens, right, loss, pairs, exact = tally.tolist()
        return {
            "test_loss": loss / max(1, tokens),
            "test_accuracy": right / max(1, tokens),
            "test_exact": exact / max(1, pairs),
        }


def token_losses(logits: Tensor, targets: Tensor, ignored: int, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each token, (b m), in nats; 0 where nothing is asked.

    Args:
        logits: (b m v).
        targets: int64 (b m).
        ignored: What stands where nothing is asked.
        label_smoothing: Share of a target that goes to all of the vocabulary.
    """
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=ignored,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses.view_as(targets)

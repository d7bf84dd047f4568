"""Lines of text through a model for pairs of sequences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from attnzoo.data.pairs import padded
from attnzoo.data.parallel import clean
from attnzoo.data.vocabulary import Vocabulary
from attnzoo.eval.text_metrics import Scores, library, score
from attnzoo.hosts.decode import Hypothesis, beam, greedy
from attnzoo.train.run import Run, Which

EMPTY = Hypothesis([], 0.0, ended=True)


@dataclass(frozen=True)
class Translations:
    """What became of some lines, in their order.

    Args:
        texts: Of each line; empty for an empty one.
        hypotheses: What was chosen for each, with its score.
        truncated: Which lines, counted from 0, were longer than the model reads, and were cut.
    """

    texts: list[str]
    hypotheses: list[Hypothesis]
    truncated: list[int]

    @property
    def unfinished(self) -> list[int]:
        """Which translations, counted from 0, had not ended at the greatest length, and were cut."""
        return [i for i, one in enumerate(self.hypotheses) if not one.ended]


def translate(
    model: nn.Module,
    vocabularies: tuple[Vocabulary, Vocabulary],
    lines: Sequence[str],
    *,
    beams: int = 4,
    length_penalty: float = 0.6,
    batch: int = 32,
    max_length: int | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> Translations:
    """Translate lines, those of about the same length at once.

    The outcome does not depend on the batches: padding has no influence.

    Args:
        model: Such as `run.model()`; stays on its device and in its mode.
        vocabularies: Of sources and targets, such as `run.vocabularies()`.
        lines: Any text; a line without tokens has an empty translation.
        beams: Hypotheses that are followed at once; 1 is greedy search.
        length_penalty: α of Wu et al., 2016, eq. 14; without meaning for one beam.
        batch: Lines at once.
        max_length: Most tokens of a translation, its end among them; as many as the model was trained for otherwise.
        report: Is told after each batch how many lines are done.
    """
    host: Any = model
    source, target = vocabularies
    most = min(max_length or host.max_length, host.max_length - 1)  # a target was bos … eos in training
    ids = [source.encode(clean(line)) if line.strip() else [] for line in lines]
    readable = host.max_length - 2  # between bos and eos
    truncated = [i for i, row in enumerate(ids) if len(row) > readable]
    order = sorted((i for i, row in enumerate(ids) if row), key=lambda i: -len(ids[i]))  # longest first
    hypotheses = [EMPTY] * len(lines)
    done = len(lines) - len(order)
    device = next(model.parameters()).device
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        x = padded([ids[i][:readable] for i in chosen]).to(device)
        found = greedy(host, x, most) if beams == 1 else beam(host, x, most, beams, length_penalty)
        for i, one in zip(chosen, found.best, strict=True):
            hypotheses[i] = one
        done += len(chosen)
        report(done)
    return Translations([target.decode(one.tokens) for one in hypotheses], hypotheses, truncated)


def evaluate_translations(run: Run, which: Which = "best", data: str | None = None, beams: int = 4) -> Scores:
    """Translate the test side and hold it against the references.

    Args:
        run: Trained on pairs.
        which: Which weights.
        data: Name of other pairs; the run's own when left out.
        beams: Hypotheses at once; 1 is greedy search.

    Raises:
        DataError: AZ7xx, when the data cannot be had; AZ708 when a library is missing.
        RunError: AZ814, when the run does not translate.
    """
    library("sacrebleu")  # before the translations, which take their time
    side = run.data(data).test
    longest = int(side.lengths[:, 1].max())
    found = translate(
        run.model(which).to(run.device),
        run.vocabularies(),
        side.source_texts,
        beams=beams,
        max_length=2 * longest + 10,  # a reference is never cut, a model that does not end is
    )
    return score(found.texts, side.target_texts)

"""How good translations are: BLEU and chrF by sacrebleu, error rates by rapidfuzz, all over the whole corpus.

BLEU: Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation", 2002. chrF: Popović, "chrF:
character n-gram F-score for automatic MT evaluation", 2015. Both as sacrebleu computes and signs them: Post, "A Call
for Clarity in Reporting BLEU Scores", 2018, arXiv:1804.08771.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from attnzoo.errors import DataError
from attnzoo.train.metrics import wilson

Interval = tuple[float, float]


@dataclass(frozen=True)
class Measure:
    """One figure.

    Args:
        value: Of the whole corpus.
        interval: Where it lies with 95 % confidence; None when nothing was drawn anew.
        signature: How it was computed, to be printed beside it.
    """

    value: float
    interval: Interval | None
    signature: str


@dataclass(frozen=True)
class Scores:
    """Translations against references.

    The intervals know of these sentences only, not of other seeds of the training.

    Args:
        sentences: How many there are.
        bleu: From 0 to 100.
        chrf: From 0 to 100.
        character_error_rate: Edits per character of the references; more than 1 is possible.
        word_error_rate: Edits per word of the references; more than 1 is possible.
        exact_match: Share of the sentences that are as the reference, character by character.
    """

    sentences: int
    bleu: Measure
    chrf: Measure
    character_error_rate: Measure
    word_error_rate: Measure
    exact_match: Measure

    def as_dict(self) -> dict[str, Any]:
        """As data, for `--json`."""
        return asdict(self)

    def rows(self) -> list[list[str]]:
        """For a table: what it is, its value, its 95 % interval, how it was computed."""
        shown = [
            ("BLEU", self.bleu, 1, ""),
            ("chrF", self.chrf, 1, ""),
            ("character error rate", self.character_error_rate, 100, " %"),
            ("word error rate", self.word_error_rate, 100, " %"),
            ("exact match", self.exact_match, 100, " %"),
        ]
        return [
            [
                name,
                f"{scale * measure.value:.2f}{unit}",
                _between(measure.interval, scale, unit),
                measure.signature,
            ]
            for name, measure, scale, unit in shown
        ]


def score(
    hypotheses: Sequence[str], references: Sequence[str], *, resamples: int = 1000, seed: int = 12345
) -> Scores:
    """Translations against one reference each.

    The intervals are sacrebleu's bootstrap: sentences are drawn anew with replacement, and 1/40 of the figures is cut
    off at each end. For sacrebleu's own default seed the draws are its own. The exact match has Wilson's interval.

    Args:
        hypotheses: The translations, as plain text.
        references: What they should be, in the same order.
        resamples: How often the sentences are drawn anew. With 0, or for one sentence, only the exact match has an
            interval.
        seed: Of the draws.

    Raises:
        DataError: AZ708 when a library is missing; AZ716 when the two do not belong together, are no lists of texts,
            or the references hold no word.
    """
    _check(hypotheses, references)
    sacrebleu, rapidfuzz = library("sacrebleu"), library("rapidfuzz")
    of = len(references)
    draws = resamples if of > 1 else 0  # one sentence drawn anew is itself

    def measure(counts: np.ndarray, figure: Callable[[np.ndarray], float], signature: str) -> Measure:
        drawn = [figure(sums) for sums in _resampled(counts, draws, seed)]
        return Measure(figure(counts.sum(axis=0)), _interval(drawn), signature)

    def by_sacrebleu(metric: Any) -> Measure:
        counts = np.array(metric._extract_corpus_statistics(hypotheses, [references]))  # a list of streams
        if draws:
            metric.n_bootstrap, metric.seed = draws, str(seed)  # its signature names them
        return measure(
            counts,
            lambda sums: float(metric._compute_score_from_stats(sums.tolist()).score),
            str(metric.get_signature()),
        )

    def rate(units: Callable[[str], Sequence[str]], name: str) -> Measure:
        distance = rapidfuzz.distance.Levenshtein.distance
        pairs = [(units(h), units(r)) for h, r in zip(hypotheses, references, strict=True)]
        counts = np.array([(distance(h, r), len(r)) for h, r in pairs])
        return measure(counts, _rate, f"Levenshtein|{name}|version:rapidfuzz {rapidfuzz.__version__}")

    hits = sum(h == r for h, r in zip(hypotheses, references, strict=True))
    return Scores(
        sentences=of,
        bleu=by_sacrebleu(sacrebleu.BLEU()),
        chrf=by_sacrebleu(sacrebleu.CHRF()),
        character_error_rate=rate(str, "characters, spaces too"),
        word_error_rate=rate(str.split, "words between spaces"),
        exact_match=Measure(hits / of, wilson(hits, of), "Wilson's interval"),
    )


def library(name: str) -> Any:
    """A library that scores text.

    Args:
        name: `sacrebleu` or `rapidfuzz`.

    Raises:
        DataError: AZ708 when it is missing.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            "AZ708",
            f"translations are scored by the library `{name}`, which is not installed",
            help='pip install "attnzoo[text]"',
        ) from error


def _check(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    """Both are lists of texts, as long as each other, and there is something to compare with."""
    for name, texts in (("hypotheses", hypotheses), ("references", references)):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise DataError(
                "AZ716",
                f"the {name} are no list of texts",
                why="a text alone would be scored letter by letter, and a list of lists is another order of sentences",
                help="give one text for each sentence",
            )
    if len(hypotheses) != len(references):
        raise DataError(
            "AZ716",
            f"there are {len(hypotheses)} hypotheses, but {len(references)} references",
            help="give one hypothesis for each reference, in the same order; an empty one where there is none",
        )
    if not any(text.split() for text in references):
        raise DataError(
            "AZ716",
            f"none of the {len(references)} references has a word",
            why="error rates are edits per character and per word of the references",
            help="give references with text",
        )


def _rate(sums: np.ndarray) -> float:
    """Edits per unit of the references; NaN where a draw met only empty references."""
    return float(sums[0] / sums[1]) if sums[1] else float("nan")


def _resampled(counts: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Sums of the counts over sentences drawn with replacement, as often as asked.

    `corpus_score(..., n_bootstrap=...)` draws the same, but holds all draws at once, 72 kB for each sentence, and reads
    its seed from the environment.

    Args:
        counts: Of each sentence, (sentences, k).
        draws: How often.
        seed: Of the draws.
    """
    rng, n = np.random.default_rng(seed), len(counts)
    counts = counts.astype(float)  # exact below 2^53; products of whole numbers are slow
    for _ in range(draws):
        yield np.bincount(rng.integers(n, size=n), minlength=n) @ counts


def _interval(values: Sequence[float]) -> Interval | None:
    """All but 1/40 of the values at each end, as sacrebleu counts them."""
    known = np.sort([value for value in values if not np.isnan(value)])
    if not len(known):
        return None
    cut = len(known) // 40
    return float(known[cut]), float(known[len(known) - 1 - cut])


def _between(interval: Interval | None, scale: float, unit: str) -> str:
    """An interval as text."""
    return "" if interval is None else f"{scale * interval[0]:.2f} to {scale * interval[1]:.2f}{unit}"

"""Heads that copy from the context what the model says.

Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality", 2024, arXiv:2404.15574, §2.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from attnzoo.core import Fraction, InstrumentCard, NonNegativeInt, Paper, PositiveInt, Probe
from attnzoo.errors import ZooError
from attnzoo.lab.finding import Finding
from attnzoo.lab.gates import gated
from attnzoo.lab.tokens import BOS, EOS, crosses, drawn, words_of

if TYPE_CHECKING:
    from attnzoo.lab.maps import Map
    from attnzoo.lab.points import Leaf
    from attnzoo.lab.subject import Batch, Subject

NAN = float("nan")
NOTHING = -1
"""Stands where the model said nothing more."""


@dataclass(frozen=True, eq=False)
class Runs:
    """Sequences that a model went on with, s tokens each.

    Args:
        batch: The whole, as the model is shown it.
        keys: The ids that heads look among, (b m).
        needle: Which of them are to be found, for each token that was said, (b s m).
        rows: The query that said each token, (b s).
        said: The tokens, (b s).
        counts: Which of them count, (b s).
        alone: Whether each token is a run of its own; otherwise each sequence is.
        recall: Share of what was to be found that the model said, of each run.
    """

    batch: "Batch"
    keys: Tensor
    needle: Tensor
    rows: Tensor
    said: Tensor
    counts: Tensor
    alone: bool
    recall: list[float]


@dataclass(kw_only=True, eq=False)
class RetrievalScore(Probe):
    """|g_h ∩ k| / |k|: the share of the needle's words that a head copied, the mean over runs where the model found it.

    A head copies a word where the strongest key of the query that says the word is in the needle and holds that very
    word. The model says, greedily, what it holds most probable. Runs count where it says more than `recall` of the
    needle (ROUGE-1 recall). Heads above `threshold` are `retrieval` heads. `recall_without_top` and
    `recall_without_random` are the recall when as many of the best heads, or of the others, give nothing.

    Args:
        on: `needle`: made from `seed` of words that the data show, all different. A sequence, which a span of words is
            the needle of, and the word before the span once more: what follows? Of pairs the needle is in the source,
            and cross-attention finds it. `data`: of sequences every asked word that stands earlier in its sequence; of
            pairs all of the source.
        needle: Words of the needle.
        depths: At how many places the needle stands, evenly spread.
        count: Sequences for each.
        dedupe: Whether a word that a head copies again counts once, as the paper says; its code counts each time.
        recall: Share of the needle above which a run counts.
        threshold: Score above which a head is a retrieval head.
        ablate: How many heads give nothing; 0 for no such figures.
        draws: How often the other heads are drawn.
        seed: What sequences and other heads are drawn from.
    """

    card = InstrumentCard(
        "retrieval_score",
        "How much of what the model copies from its context each head points at.",
        equation="s_h = |g_h ∩ k| / |k|",
        paper=Paper(
            "Retrieval Head Mechanistically Explains Long-Context Factuality",
            "Wu et al.",
            2024,
            "arXiv:2404.15574",
            "§2, eq. 1",
        ),
        needs={"weights", "words"},
        fidelity="adapted",
        notes="A form for small models: instead of a sentence in essays and a question, a span of words in random ones,"
        " and the word before it.",
    )
    on: Literal["needle", "data"] = "needle"
    needle: PositiveInt = 4
    depths: PositiveInt = 5
    count: PositiveInt = 8
    dedupe: bool = True
    recall: Fraction = 0.5
    threshold: Fraction = 0.1
    ablate: NonNegativeInt = 1
    draws: PositiveInt = 10
    seed: NonNegativeInt = 0

    @torch.no_grad()
    def measure(self, subject) -> Finding:
        runs = list(self._runs(subject))
        shown = replace(subject, batches=[one.batch for one in runs], training=())
        sums: dict[Leaf, Tensor] = {}
        for one, (_, maps) in zip(runs, shown.maps(), strict=True):
            for leaf, found, _ in maps:
                if crosses(leaf) == (subject.kind == "pairs"):
                    sums[leaf] = sums.get(leaf, 0) + self._copied(found, one)
        if not sums:
            raise ZooError("AZ924", f"no map of `{subject.name}` shows where it finds what it says")
        recalls = [share for one in runs for share in one.recall]
        counted = sum(int((one.counts if one.alone else one.counts.any(dim=1)).sum()) for one in runs)
        scores = {leaf: of / counted if counted else of * NAN for leaf, of in sums.items()}
        rows = [
            subject.about(leaf, head) | {"score": value, "retrieval": value > self.threshold}
            for leaf, of in scores.items()
            for head, value in enumerate(of.tolist())
        ]
        figures = {"runs": len(recalls), "counted": counted, "recall": _mean(recalls)}
        notes = (
            [] if counted else ["The model found what it should in no run: nothing is known of its heads."]
        )
        if counted and self.ablate:
            figures |= self._ablated(subject, scores)
        return Finding.of(rows, shows="score", figures=figures, notes=notes)

    def _copied(self, found: "Map", runs: Runs) -> Tensor:
        """What each head copied in the runs that count, summed over them, (h,)."""
        weights = found.matrix()
        (b, h, _, m), s = weights.shape, runs.rows.shape[1]
        asked = weights.gather(2, runs.rows[:, None, :, None].expand(b, h, s, m))
        best = asked.argmax(dim=-1)  # (b h s)
        inside = runs.needle[:, None].expand(b, h, s, m).gather(3, best[..., None])[..., 0]
        hit = inside & (runs.keys[:, None].expand(b, h, m).gather(2, best) == runs.said[:, None])
        hit &= runs.counts[:, None]
        if runs.alone:
            return hit.sum(dim=(0, 2)).double().cpu()
        if self.dedupe:
            same = (runs.said[:, :, None] == runs.said[:, None]).tril(-1)  # (b s s)
            hit &= ~(hit[:, :, None] & same[:, None]).any(dim=-1)  # a head copied it at an earlier step
        needles = [keys[there] for keys, there in zip(runs.keys, runs.needle[:, 0], strict=True)]
        size = hit.new_tensor(
            [max(1, len(of.unique() if self.dedupe else of)) for of in needles], dtype=torch.double
        )
        return (hit.sum(dim=2) / size[:, None]).sum(dim=0).cpu()

    def _ablated(self, subject: "Subject", scores: "dict[Leaf, Tensor]") -> dict[str, float]:
        """The recall without the best heads, and without as many of the others, the mean over draws."""
        leaves = [leaf for leaf in scores if not leaf.lacks("heads")]
        if not leaves:
            return {}
        every = torch.cat([scores[leaf] for leaf in leaves])
        order, few = every.argsort(descending=True), self.ablate
        if len(order) < 2 * few:
            return {}
        generator, without = torch.Generator().manual_seed(self.seed), [order[:few]]
        for _ in range(self.draws):
            without.append(order[few:][torch.randperm(len(order) - few, generator=generator)[:few]])
        recalls = []
        for heads in without:
            with gated(subject, leaves, torch.ones(len(order)).index_fill(0, heads, 0)):
                recalls.append(_mean([share for one in self._runs(subject) for share in one.recall]))
        return {"recall_without_top": recalls[0], "recall_without_random": _mean(recalls[1:])}

    def _runs(self, subject: "Subject") -> Iterator[Runs]:
        """What the model says."""
        if subject.kind == "pairs":
            for source, needle in self._sources(subject):
                yield self._translated(subject, source, needle)
        elif self.on == "needle":
            for prompt, first in self._prompts(subject):
                yield self._continued(subject, prompt, first)
        else:
            for batch in subject.batches:
                yield self._answered(subject, batch)

    def _made(self, subject: "Subject", length: int) -> Iterator[tuple[Tensor, int]]:
        """Random words (b n), and where the needle begins among them."""
        words, generator = words_of(subject), torch.Generator().manual_seed(self.seed)
        length = min(length, len(words))
        if length <= self.needle:
            raise ZooError(
                "AZ926",
                f"there is no room for a needle of {self.needle} words",
                why=f"the data show {len(words)} words, in sequences of {subject.batches[0].inputs[0].shape[1]} tokens",
                help="make it shorter, needle=2, or ask on='data'",
            )
        for first in torch.linspace(0, length - self.needle, self.depths).long().unique().tolist():
            yield drawn(words, self.count, length, generator), first

    def _prompts(self, subject: "Subject") -> Iterator[tuple[Tensor, int]]:
        """Sequences that end on the word before the needle, (b n), and where the needle begins."""
        if not getattr(subject.model, "causal", False):
            raise ZooError(
                "AZ927",
                f"`{subject.name}` does not go on with a sequence: it sees what is to come",
                help="a causal model does, and one for pairs",
            )
        length = subject.batches[0].inputs[0].shape[1] - self.needle
        for hay, first in self._made(subject, length):
            first = max(first, 1)  # a word has to stand before it
            yield torch.cat([hay, hay[:, first - 1 : first]], dim=1), first

    def _continued(self, subject: "Subject", prompt: Tensor, first: int) -> Runs:
        """A sequence model goes on with a prompt (b n)."""
        ids, (b, n) = prompt, prompt.shape
        for _ in range(self.needle):
            output = subject.call(replace(subject.batches[0], inputs=(ids,), targets=None))
            if output.ndim != 3:
                raise ZooError(
                    "AZ927", f"`{subject.name}` says one thing of a sequence, and not what comes next"
                )
            ids = torch.cat([ids, output[:, -1:].argmax(dim=-1)], dim=1)
        fed, said = ids[:, :-1], ids[:, n:]
        needle = torch.zeros_like(fed, dtype=torch.bool)
        needle[:, first : first + self.needle] = True
        rows = torch.arange(n - 1, n - 1 + self.needle, device=ids.device).expand(b, -1)
        return self._found(replace(subject.batches[0], inputs=(fed,), targets=None), fed, needle, rows, said)

    def _sources(self, subject: "Subject") -> Iterator[tuple[Tensor, Tensor]]:
        """Sources (b n), and which of their tokens are the needle (b n)."""
        if self.on == "data":
            for batch in subject.batches:
                yield batch.inputs[0], batch.inputs[0] > EOS
            return
        for words, first in self._made(subject, subject.batches[0].inputs[0].shape[1] - 2):
            ends = [words.new_full((len(words), 1), end) for end in (BOS, EOS)]
            source = torch.cat([ends[0], words, ends[1]], dim=1)
            needle = torch.zeros_like(source, dtype=torch.bool)
            needle[:, 1 + first : 1 + first + self.needle] = True
            yield source, needle

    def _translated(self, subject: "Subject", source: Tensor, needle: Tensor) -> Runs:
        """A model for pairs translates sources (b n)."""
        from attnzoo.hosts.decode import greedy  # these need timm
        from attnzoo.hosts.seq2seq import Seq2Seq

        if not isinstance(subject.model, Seq2Seq):
            raise ZooError("AZ927", f"`{subject.name}` takes pairs and does not translate")
        found = greedy(subject.model, source, source.shape[1]).tokens
        longest = max(1, max(map(len, found)))
        said = source.new_tensor([row + [NOTHING] * (longest - len(row)) for row in found])
        target = torch.cat([said.new_full((len(said), 1), BOS), said[:, :-1]], dim=1).clamp(min=0)
        rows = torch.arange(longest, device=source.device).expand(len(source), -1)
        batch = replace(subject.batches[0], inputs=(source, target), targets=None)
        return self._found(batch, source, needle, rows, said)

    def _found(self, batch: "Batch", keys: Tensor, needle: Tensor, rows: Tensor, said: Tensor) -> Runs:
        """Runs of whole sequences, of which those with enough recall count."""
        recall = []
        for there, ids, words in zip(needle, keys, said.tolist(), strict=True):
            wanted = Counter(ids[there].tolist())
            recall.append((wanted & Counter(words)).total() / max(1, wanted.total()))
        enough = torch.tensor([share > self.recall for share in recall], device=keys.device)
        counts = enough[:, None] & (said != NOTHING)
        whole = needle[:, None].expand(-1, said.shape[1], -1)
        return Runs(batch, keys, whole, rows, said, counts, False, recall)

    def _answered(self, subject: "Subject", batch: "Batch") -> Runs:
        """A sequence model answers what the data ask, each answer a run of its own."""
        ids, targets, output = batch.inputs[0], subject.targets(batch), subject.call(batch)
        said = output.argmax(dim=-1)
        if said.shape != targets.shape or targets.shape != ids.shape:
            raise ZooError("AZ927", f"`{subject.name}` is not asked for words of its sequences")
        needle = (
            ids[:, None] == targets[:, :, None]
        ).tril()  # (b n m): where the answer stands, up to the question
        asked = needle.any(dim=-1)
        rows = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        right = asked & (said == targets)
        return Runs(batch, ids, needle, rows, said, right, True, right[asked].double().tolist())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else NAN

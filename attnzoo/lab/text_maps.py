"""The attention maps of models of sequences: of an encoder, of a decoder, of a decoder on an encoder, of one stack.

maps = collect_text(model, source, target)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from attnzoo.data.pairs import PairData, padded
from attnzoo.data.sequences import IGNORE, SequenceData
from attnzoo.data.vocabulary import SPECIALS, UNK, Symbols, Vocabulary
from attnzoo.errors import ZooError
from attnzoo.hosts.decode import greedy
from attnzoo.hosts.seq2seq import Seq2Seq, module_path
from attnzoo.hosts.sequence import SequenceModel
from attnzoo.lab.maps import Absent, Map, look
from attnzoo.lab.rollout import check_layer, check_some
from attnzoo.plot.palette import GREEN, RED, Line

Side = Literal["encoder", "decoder", "cross", "layers"]
"""A kind of site: `encoder.i`, `decoder.i.self`, `decoder.i.cross`, or `layers.i` of a single stack."""
UNTRAINED = 10
"""Tokens that an untrained model is shown."""


@dataclass(frozen=True)
class Stack:
    """The maps of one kind of site.

    Args:
        side: Which.
        layers: The layers that are looked at, from 0.
        causal: Whether a query sees only keys at or before its own position.
        maps: In the order of layers, then of branches; `layer` counts from 0 in each stack.
        absent: The branches that have none, and why.
    """

    side: Side
    layers: tuple[int, ...]
    causal: bool
    maps: tuple[Map, ...]
    absent: tuple[Absent, ...]

    def heads(self) -> list[int]:
        """How many heads with a map each of the layers has, over all branches."""
        return [sum(one.heads for one in self.maps if one.layer == layer) for layer in self.layers]

    def branches(self) -> list[str]:
        """Names of the branches that have maps, in order of appearance."""
        return list(dict.fromkeys(one.branch for one in self.maps))


@dataclass(frozen=True)
class TextMaps:
    """All maps of a model on some sequences.

    Args:
        stacks: `encoder`, `decoder` and `cross`, or `layers` alone.
        output: What the model answered, (b m v) or (b n o).
    """

    stacks: tuple[Stack, ...]
    output: Tensor

    @property
    def maps(self) -> tuple[Map, ...]:
        """Of all stacks."""
        return tuple(one for stack in self.stacks for one in stack.maps)

    @property
    def absent(self) -> tuple[Absent, ...]:
        """Of all stacks."""
        return tuple(one for stack in self.stacks for one in stack.absent)

    def only(self, side: str | None = None, layer: int | None = None) -> "TextMaps":
        """The maps of one kind of site, of one layer, or of one layer of one kind.

        Args:
            side: `encoder`, `decoder` or `cross`; None for all.
            layer: From 0; None for all. Stacks without it are left out.

        Raises:
            ZooError: AZ908, when there is no such kind of site; AZ904, when no stack has such a layer; AZ903, when
                nothing that is left has a map.
        """
        chosen = [stack for stack in self.stacks if side in (None, stack.side)]
        if not chosen:
            raise ZooError(
                "AZ908",
                f"`--site {side}` belongs to an encoder and decoder; this model is one stack",
                help="leave it out, or choose a layer with --layer",
            )
        check_layer(1 + max(i for stack in chosen for i in stack.layers), layer)
        left = tuple(
            replace(
                stack,
                layers=tuple(i for i in stack.layers if layer in (None, i)),
                maps=tuple(one for one in stack.maps if layer in (None, one.layer)),
                absent=tuple(one for one in stack.absent if layer in (None, one.layer)),
            )
            for stack in chosen
            if layer is None or layer in stack.layers
        )
        found = replace(self, stacks=left)
        check_some(found.maps, found.absent)
        return found


def collect_text(model: nn.Module, *inputs: Tensor) -> TextMaps:
    """The maps of every layer, branch and head for some sequences, from one forward in eval mode.

    Padding is a key that nobody attends to; the rows of queries that are padding mean nothing.

    Args:
        model: A `Seq2Seq` or a `SequenceModel`; it is left as it was.
        inputs: What it is called with: source and target ids (b n) and (b m), or ids (b n) or vectors (b n e).

    Raises:
        ZooError: AZ908, when the model is none of these.
        LayoutMismatch: AZ407, when a sequence is too long.
    """
    sides: dict[Side, list[str]]
    if isinstance(model, Seq2Seq):
        encoder, decoder = range(len(model.encoder)), range(len(model.decoder))
        sides = {
            "encoder": [f"encoder.{i}" for i in encoder],
            "decoder": [f"decoder.{i}.self" for i in decoder],
            "cross": [f"decoder.{i}.cross" for i in decoder],
        }
    elif isinstance(model, SequenceModel):
        sides = {"layers": [f"layers.{i}" for i in range(len(model.layers))]}
    else:
        raise ZooError(
            "AZ908",
            f"{type(model).__name__} is no model of sequences",
            help="`attnzoo.lab.maps.collect` is for images",
        )
    sites = {name: model.get_submodule(module_path(name)) for names in sides.values() for name in names}
    looked = look(model, sites, inputs)
    stacks = []
    for side, names in sides.items():
        here = [replace(one, layer=names.index(one.site)) for one in looked.read if one.site in names]
        maps = tuple(one for one in here if isinstance(one, Map))
        absent = tuple(one for one in here if isinstance(one, Absent))
        causal = side == "decoder" or (side == "layers" and bool(model.causal))
        stacks.append(Stack(side, tuple(range(len(names))), causal, maps, absent))
    return TextMaps(tuple(stacks), looked.output)


@dataclass(frozen=True)
class Example:
    """A sequence, or a pair of them, as a model is given it and as a person reads it.

    Args:
        name: What it is: `test pair 17`.
        inputs: What the model is called with, a batch of one.
        words: A readable text for each token, by side; of `cross` for each query. Keys of `cross` are those of
            `encoder`.
        lines: What is written above its maps.
    """

    name: str
    inputs: tuple[Tensor, ...]
    words: Mapping[Side, Sequence[str]]
    lines: tuple[Line, ...]

    def keys(self, side: Side) -> Sequence[str]:
        """A readable text for each key."""
        return self.words["encoder" if side == "cross" else side]


def _pair(
    name: str,
    source: Tensor,
    target: Sequence[int],
    words: tuple[Sequence[str], Sequence[str]],
    lines: Sequence[Line],
) -> Example:
    """A pair as the decoder is given it: all tokens of the target but the last, each asked for the next one."""
    first, second = words
    arrows = [
        f"{given.strip()} › {following.strip()}"
        for given, following in zip(second[:-1], second[1:], strict=True)
    ]
    by_side: dict[Side, Sequence[str]] = {"encoder": first, "decoder": second[:-1], "cross": arrows}
    return Example(name, (source, torch.tensor([target[:-1]])), by_side, tuple(lines))


def translated_example(
    model: Seq2Seq,
    vocabularies: tuple[Vocabulary, Vocabulary],
    source: Sequence[int] | str,
    target: Sequence[int] | str | None = None,
    *,
    name: str,
    true: bool = False,
) -> Example:
    """A source with a target, and what the model makes of the source by itself, greedily.

    Args:
        model: In eval mode.
        vocabularies: Of sources and targets.
        source: Text, or ids without beginning and end.
        target: Text, or ids without beginning and end, that the decoder is given; None for the model's own.
        name: What it is called.
        true: Whether the target is the true one: then the model's own is green where it is the same, and red where not.

    Raises:
        ZooError: AZ908, when a text is empty, too long, or has a symbol that there is not.
    """
    first, second = vocabularies
    ids = padded([_ids(source, first, "source", model)])
    found = greedy(model, ids, model.max_length - 1).best[0]
    said = f"the model says: {second.decode(found.tokens)}{'' if found.ended else ' …, without an end'}"
    lines: list[Line] = [(f"source: {first.decode(ids[0].tolist())}", None)]
    if target is None:
        given = [model.bos, *found.tokens, *([model.eos] if found.ended else [])]
        lines.append((said, None))
    else:
        own = _ids(target, second, "target", model)
        given = [model.bos, *own, model.eos]
        right = found.ended and found.tokens == own
        kind, colour = ("true target", GREEN if right else RED) if true else ("given target", None)
        lines += [(f"{kind}: {second.decode(own)}", None), (said, colour)]
    return _pair(name, ids, given, (first.words(ids[0].tolist()), second.words(given)), lines)


def _ids(text: Sequence[int] | str, vocabulary: Vocabulary, side: str, model: Seq2Seq) -> list[int]:
    """The ids of a text that was typed; of a data set's, as they are."""
    if not isinstance(text, str):
        return list(text)
    ids, most = vocabulary.encode(text), model.max_length - 2
    if not ids or not text.strip():
        raise ZooError("AZ908", f"the {side} `{text}` is empty", help="write at least one word")
    if UNK in ids and isinstance(vocabulary, Symbols):  # in running text an unknown word is nothing unusual
        strange = next(word for word in text.split() if word not in vocabulary.symbols)
        raise ZooError(
            "AZ908",
            f"`{strange}` is no symbol of the {side}s",
            why=f"they are made of {' '.join(vocabulary.symbols[:40])}",
            help="write symbols with spaces between",
        )
    if len(ids) > most:
        raise ZooError(
            "AZ908", f"the {side} has {len(ids)} tokens; the model reads {most}", help="choose a shorter one"
        )
    return ids


def pair_example(model: Seq2Seq, data: PairData, index: int) -> Example:
    """A pair of the test side with its true target.

    Args:
        model: In eval mode.
        data: Of a run.
        index: Which pair.
    """
    pair = data.test.sources[index], data.test.targets[index]
    return translated_example(model, (data.source, data.target), *pair, name=f"test pair {index}", true=True)


def sequence_example(model: SequenceModel, data: SequenceData, chosen: int | str, name: str = "") -> Example:
    """A sequence of the test side with its answers, or one that was typed.

    Args:
        model: In eval mode.
        data: Of a run.
        chosen: Which sequence, or its tokens as text.
        name: What it is called; `test sequence 17` when left out.

    Raises:
        ZooError: AZ908, when the data have no words, or others, or the text is empty or too long.
    """
    if isinstance(chosen, str):
        inputs, targets = _typed(model, data, chosen), None
    else:
        inputs, targets = data.test.batch(torch.tensor([chosen]))
        name = name or f"test sequence {chosen}"
    with torch.no_grad():
        output = model(inputs)[0]  # (n o)
    n = inputs.shape[1]
    words = [data.words[i] for i in inputs[0].tolist()] if data.words else [str(i) for i in range(n)]
    if data.words is None and data.vocab:
        words = [str(i) for i in inputs[0].tolist()]
    return Example(name, (inputs,), {"layers": words}, tuple(_answers(data, output, targets)))


def _typed(model: SequenceModel, data: SequenceData, text: str) -> Tensor:
    if not data.vocab:
        raise ZooError(
            "AZ908",
            f"`{data.name}` has vectors, which cannot be typed",
            help="leave --text out: a sequence of the test side is drawn",
        )
    known = {word: i for i, word in enumerate(data.words or map(str, range(data.vocab)))}
    tokens = text.split()
    strange = [word for word in tokens if word not in known]
    if strange or not tokens:
        said = (
            f"`{strange[0]}` is no token of `{data.name}`" if strange else f"the sequence `{text}` is empty"
        )
        raise ZooError(
            "AZ908",
            said,
            why=f"its tokens are {' '.join(list(known)[:40])}",
            help="tokens stand between spaces",
        )
    if len(tokens) > model.max_length:
        raise ZooError(
            "AZ908",
            f"the sequence has {len(tokens)} tokens; the model reads {model.max_length}",
            help="choose a shorter one",
        )
    return torch.tensor([[known[word] for word in tokens]])


def _answers(data: SequenceData, output: Tensor, targets: Tensor | None) -> list[Line]:
    """What is asked, what is true and what the model says, (n o) and (1 n) or (1 n o)."""
    if data.regression:
        if targets is None:
            return []
        asked = ~targets[0].isnan()
        error = (output - targets[0])[asked].square().mean()
        return [
            (f"asked at {int(asked.any(dim=1).sum())} positions; mean squared error {float(error):.3g}", None)
        ]
    names = (
        data.words
        if data.words and len(data.words) == data.outputs
        else [str(i) for i in range(data.outputs)]
    )
    guesses = output.argmax(dim=-1)
    if targets is None:
        return [(f"the model says: {' '.join(names[i] for i in guesses.tolist())}", None)]
    asked = targets[0] != IGNORE
    right = bool((guesses == targets[0])[asked].all())
    places = asked.nonzero()[:, 0].tolist()
    everywhere = len(places) == len(asked)
    where = "everywhere" if everywhere else f"at {', '.join(map(str, places))}, counted from 0"
    return [
        (f"asked {where}", None),
        (f"true: {' '.join(names[i] for i in targets[0][asked].tolist())}", None),
        (f"the model says: {' '.join(names[i] for i in guesses[asked].tolist())}", GREEN if right else RED),
    ]


def random_example(model: Seq2Seq | SequenceModel, seed: int, length: int = UNTRAINED) -> Example:
    """Random tokens for a model that has no data.

    Args:
        model: Any.
        seed: Of the tokens.
        length: Tokens of each sequence, at most as many as the model takes.
    """
    generator = torch.Generator().manual_seed(seed)
    n = min(length, model.max_length)

    def drawn(least: int, size: int, count: int) -> list[int]:
        return torch.randint(min(least, size - 1), size, (count,), generator=generator).tolist()

    if isinstance(model, SequenceModel):
        if isinstance(model.embed, nn.Embedding):
            ids = drawn(0, model.embed.num_embeddings, n)
            return Example("random ids", (torch.tensor([ids]),), {"layers": [str(i) for i in ids]}, ())
        vectors = torch.randn(1, n, model.embed.in_features, generator=generator)
        return Example("random vectors", (vectors,), {"layers": [str(i) for i in range(n)]}, ())
    sizes = model.embed_source.num_embeddings, model.embed_target.num_embeddings
    source, target = (
        [model.bos, *drawn(len(SPECIALS), size, max(n - 2, 0)), model.eos][: max(n, 2)] for size in sizes
    )
    said = tuple([SPECIALS[i] if i < len(SPECIALS) else str(i) for i in ids] for ids in (source, target))
    return _pair("random ids", torch.tensor([source]), target, (said[0], said[1]), ())

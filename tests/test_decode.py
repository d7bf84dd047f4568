"""Greedy and beam search: against each other, against recomputation, exhaustive search and hand-made models."""

import inspect
import itertools
import json
import math
import sys
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import attnzoo
import attnzoo.hosts.decode as decode
from attnzoo.bench import decoding
from attnzoo.cli.app import app
from attnzoo.errors import LayoutMismatch
from attnzoo.hosts.decode import Hypothesis, beam, greedy
from attnzoo.hosts.seq2seq import Memory

SMALL = ("host.dim=32", "host.mlp_dim=48", "host.layers=3", "host.vocab=13", "host.max_length=16", "heads=4")
BATCH = 6


def composed(*edits: str, eos: float = 0.0, seed: int = 0):
    """A small model in float64 whose parameters hide nothing.

    Args:
        edits: Of the recipe `transformer`.
        eos: Is added to the end's logit.
        seed: Of the parameters.
    """
    torch.manual_seed(seed)
    model = attnzoo.compose("transformer", edits=[*SMALL, *edits]).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        model.head.bias[model.eos] += eos
    return model


def sources(count: int = BATCH, longest: int = 9, vocab: int = 13) -> torch.Tensor:
    """Sources of different lengths, (b n)."""
    ids = torch.randint(3, vocab, (count, longest))
    lengths = torch.arange(count) % longest + 1
    return ids.masked_fill(torch.arange(longest) >= lengths[:, None], 0)


def cut(source: torch.Tensor, row: int) -> torch.Tensor:
    """One source without its padding, (1 n)."""
    return source[row : row + 1, : int((source[row] != 0).sum())]


def forced(model, source: torch.Tensor, one: Hypothesis) -> float:
    """log P(y | x) by teacher forcing, of one source without padding."""
    asked = [*one.tokens, *([model.eos] if one.ended else [])]
    given = torch.tensor([[model.bos, *asked[:-1]]])
    with torch.no_grad():
        gained = model(source, given).log_softmax(dim=-1)[0]
    return sum(gained[i, token].item() for i, token in enumerate(asked))


# A hand-made model


class Prefixes:
    """The state of `Toy`: the tokens so far, by row."""

    def __init__(self, rows):
        self.rows = rows

    def select(self, rows, same_sources=False):
        self.rows = [self.rows[i] for i in rows.tolist()]


class Toy(nn.Module):
    """Probabilities of the next token as a function of source and prefix.

    Args:
        probabilities: From the source's first id and the tokens so far to probabilities of all ids.
    """

    pad, bos, eos, max_length = 0, 1, 2, 8

    def __init__(self, probabilities):
        super().__init__()
        self.probabilities = probabilities

    def encode(self, source):
        return Memory(source[..., None].double(), source != 0)

    def start(self, memory):
        return Prefixes([(int(row[0]), ()) for row in memory.tokens])

    def step(self, tokens, state):
        state.rows = [(x, (*prefix, int(t))) for (x, prefix), (t,) in zip(state.rows, tokens, strict=True)]
        rows = [self.probabilities(x, prefix[1:]) for x, prefix in state.rows]
        return torch.tensor(rows, dtype=torch.float64).log()[:, None]


def table(rows: dict[tuple[int, ...], list[float]]):
    """A toy: prefix to probabilities of end, 3 and 4."""
    return Toy(lambda _, prefix: [0.0, 0.0, *rows.get(prefix, [0.2, 0.4, 0.4])])


def random_toy(seed: int, symbols: int = 2) -> Toy:
    """A toy with other probabilities for every prefix; padding and beginning have some too."""

    def probabilities(x, prefix):
        generator = torch.Generator().manual_seed(hash((seed, x, prefix)) % 2**31)
        return (2 * torch.randn(3 + symbols, generator=generator)).softmax(0).tolist()

    return Toy(probabilities)


def every_ended(model: Toy, x: int, longest: int) -> list[Hypothesis]:
    """All sequences that end within so many tokens, the end among them."""
    found = []
    for length in range(longest):
        for tokens in itertools.product([3, 4], repeat=length):
            asked = [*tokens, model.eos]
            score = sum(math.log(model.probabilities(x, tokens[:i])[t]) for i, t in enumerate(asked))
            found.append(Hypothesis(list(tokens), score, True))
    return found


def check_finished_are_kept(beam) -> None:
    """(), which ends at once, is more probable than anything longer."""
    toy = table({(): [0.35, 0.4, 0.25]})
    found = beam(toy, torch.tensor([[5]]), 6, beams=2, length_penalty=0.0)
    assert found.tokens == [[]] and found.ended == [True]
    assert found.scores[0] == pytest.approx(math.log(0.35))


def check_one_beam_is_greedy(beam) -> None:
    """On toys with every prefix its own; several sources at once."""
    for seed in range(20):
        toy, source = random_toy(seed), torch.tensor([[3], [4], [5]])
        one, other = beam(toy, source, 6, beams=1), greedy(toy, source, 6)
        assert one.tokens == other.tokens and one.ended == other.ended
        assert one.scores == pytest.approx(other.scores)


def check_exhaustive(beam) -> None:
    """With room for everything the search finds the best of all."""
    for seed, alpha in itertools.product(range(15), [0.0, 0.6, 2.0, -1.0]):
        toy, source, longest = random_toy(seed), torch.tensor([[3], [4]]), 5
        found = beam(toy, source, longest, beams=100, length_penalty=alpha)
        for x, one in zip([3, 4], found.best, strict=True):
            best = max(every_ended(toy, x, longest), key=lambda each: each.rank(alpha))
            assert one.tokens == best.tokens and one.ended and one.score == pytest.approx(best.score)


def check_batch(beam) -> None:
    """Sources that end at different times do not disturb each other."""
    for seed in range(10):
        toy, source = random_toy(seed, symbols=4), torch.arange(3, 15)[:, None]
        found = beam(toy, source, 8, beams=3)
        for row, together in zip(source, found.best, strict=True):
            (alone,) = beam(toy, row[None], 8, beams=3).best
            assert (together.tokens, together.ended) == (alone.tokens, alone.ended)
            assert together.score == pytest.approx(alone.score)


def check_penalty(beam) -> None:
    """More α, longer: (3, 3) has half the probability of ()."""
    toy = table({(): [0.5, 0.5, 0.0], (3,): [0.0, 0.9, 0.1], (3, 3): [0.5, 0.25, 0.25]})
    short, long = (beam(toy, torch.tensor([[5]]), 6, beams=3, length_penalty=a) for a in (0.0, 3.0))
    assert short.tokens == [[]] and long.tokens == [[3, 3]]
    # log 0.5 = -0.693 at 1; log 0.225 = -1.492 at ((5 + 3) / 6)^3 = 2.370 gives -0.629
    assert long.best[0].rank(3.0) == pytest.approx(math.log(0.225) / (8 / 6) ** 3)
    # log 0.4 = -0.916 of (3) cannot win at ((5 + 2) / 6)^2, and does at ((5 + 4) / 6)^2: -0.443 against -0.511
    sure = {
        (): [0.6, 0.4, 0.0],
        (3,): [0.0, 1.0, 0.0],
        (3, 3): [0.0, 1.0, 0.0],
        (3, 3, 3): [0.98, 0.01, 0.01],
    }
    assert beam(table(sure), torch.tensor([[5]]), 4, beams=2, length_penalty=2.0).tokens == [[3, 3, 3]]


def check_places(beam) -> None:
    """One that ended keeps its place: there are never more hypotheses than beams."""
    for seed in range(10):
        found = beam(random_toy(seed), torch.tensor([[3], [4]]), 6, beams=3, every=True)
        assert [len(each) for each in found.hypotheses] == [3, 3]
        assert any(one.ended for each in found.hypotheses for one in each)


CHECKS = [
    check_finished_are_kept,
    check_one_beam_is_greedy,
    check_exhaustive,
    check_batch,
    check_penalty,
    check_places,
]


@pytest.mark.parametrize("check", CHECKS)
def test_beam(check):
    check(beam)


MUTANTS = {
    "finished ones are dropped": ("found[of[block]].append(Hypothesis(ids, scores[block, place].item(), ended=True))", "pass"),
    "finished ones leave their place": ("places >= room[:, None]", "places >= beams"),
    "parents are forgotten": ("(blocks[:, None] * width + parents)", "(blocks[:, None] * width + 0 * parents)"),
    "tokens of another parent": ("tokens[blocks[:, None], parents]", "tokens[blocks[:, None], 0 * parents]"),
    "stops at the first end": ("/ kindest <= scores.new_tensor(reached)", "* 1e9 <= scores.new_tensor(reached)"),
    "stops as if all lengths were alike": ("kindest = max(", "kindest = min("),
    "no penalty": ("return self.score / _penalty", "return self.score + 0 * _penalty"),
    "padding may be chosen": ("gained[:, [self.model.pad, self.model.bos]] = NEVER", "pass"),
    "a source that is done takes its row along": ("of, room = of[blocks], room[blocks]", "room = room[blocks]"),
    "cut ones win": ("not one.ended, -one.rank", "one.ended, -one.rank"),
}  # fmt: skip
"""What could be wrong, as a line and what stands in its place."""


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.sample(3)
def test_checks_catch(name, monkeypatch):
    line, instead = MUTANTS[name]
    source = inspect.getsource(decode)
    assert source.count(line) == 1
    mutant = ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", mutant)  # dataclasses look there
    exec(compile(source.replace(line, instead), "mutant", "exec"), mutant.__dict__)
    caught = []
    for check in CHECKS:
        try:
            check(mutant.beam)
        except (AssertionError, IndexError, RuntimeError):
            caught.append(check.__name__)
    assert caught


def test_length_penalty_by_hand():
    assert Hypothesis([7, 8, 9], -2.0, ended=True).rank(0.6) == pytest.approx(-2 / 1.5**0.6)  # (5 + 4) / 6
    assert Hypothesis([7, 8, 9], -2.0, ended=False).rank(1.0) == pytest.approx(-2 / (8 / 6))
    assert Hypothesis([], -2.0, ended=True).rank(5.0) == -2.0  # (5 + 1) / 6
    assert Hypothesis([7, 8], -2.0, ended=True).rank(0.0) == -2.0


def test_one_that_ended_wins_over_one_that_was_cut():
    toy = table(
        {(): [0.04, 0.95, 0.01], (3,): [0.0, 1.0, 0.0], (3, 3): [0.0, 1.0, 0.0], (3, 3, 3): [0.0, 1.0, 0.0]}
    )
    found = beam(toy, torch.tensor([[5]]), 4, beams=2, every=True)
    assert [(one.tokens, one.ended) for one in found.hypotheses[0]] == [([], True), ([3, 3, 3, 3], False)]


def test_every_hypothesis_is_there_when_asked_for():
    toy, source = random_toy(3), torch.tensor([[3], [4]])
    found = beam(toy, source, 5, beams=100, every=True)
    for x, each in zip([3, 4], found.hypotheses, strict=True):
        ended = [one for one in each if one.ended]
        assert sorted(one.tokens for one in ended) == sorted(one.tokens for one in every_ended(toy, x, 5))
        assert [one.rank(0.6) for one in ended] == sorted((one.rank(0.6) for one in ended), reverse=True)
        assert len(each) - len(ended) == 2**5 and each[: len(ended)] == ended


# Models


CROSS, OWN = "overrides=[{at: 'decoder.*.cross', put: %s}]", "overrides=[{at: 'decoder.*.self', put: %s}]"
MODELS = [
    *[(f"host.positions={kind}",) for kind in ("sinusoidal", "learned", "rotary", "none")],
    ("host.norm_first=false",),
    ("host.norm_first=false", "host.positions=rotary", "host.norm=scalar"),
    ("host.tie=all",),
    *[
        (CROSS % name,)
        for name in ("additive", "luong_global", "luong_local", "grouped_query", "elu_linear", "soft")
    ],
    *[(OWN % name,) for name in ("additive", "grouped_query", "elu_linear", "luong_local")],
    (OWN % "{fuse: add, of: [softmax, elu_linear]}",),
    (OWN % "{fuse: add, of: [softmax, elu_linear]}", "host.positions=rotary"),
    (OWN % "{fuse: concat, of: [grouped_query, {fuse: hadamard, of: [softmax, elu_linear]}]}",),
    (CROSS % "{fuse: add, of: [softmax, soft]}", "host.norm_first=false"),
    *[
        (f"skip={{use: {use}, at: '{at}'}}",)
        for use in ("merged", "merged_raw", "merged_post", "probs_pairmean", "logits_pairmean")
        for at in ("decoder.*.self", "decoder.*.cross", "encoder.*")
    ],
    ("skip=cross",),
    ("skip=cross", CROSS % "soft"),
    ("skip=merged", "heads={encoder: [8, 4, 2], decoder: 4}"),
    ("skip={use: encoder_stack, at: 'decoder.*.self', encoders: 3}",),
    ("skip={use: encoder_stack, encoders: 3}",),
]


@pytest.mark.parametrize("edits", MODELS, ids=lambda edits: " ".join(edits))
@pytest.mark.sample(3)
def test_kept_keys_and_values_give_what_recomputation_gives(edits):
    model, source = composed(*edits, eos=2.0), sources()
    target = torch.randint(3, 13, (BATCH, 10))
    target[:, 0] = model.bos
    with torch.no_grad():
        memory = model.encode(source)
        wanted = model.decode(target, memory)
        for sizes in ((1,) * 10, (1, 4, 2, 3)):
            state = model.start(memory)
            rows = [model.step(part, state) for part in target.split(list(sizes), dim=1)]
            torch.testing.assert_close(torch.cat(rows, dim=1), wanted, rtol=0, atol=1e-12)
    for search in (greedy, beam, lambda *given, **how: beam(*given, beams=1, **how)):
        one, other = search(model, source, 12), search(model, source, 12, cached=False)
        assert one.tokens == other.tokens and one.ended == other.ended
        torch.testing.assert_close(torch.tensor(one.scores), torch.tensor(other.scores), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 2, 3])
@pytest.mark.parametrize("search", [greedy, beam])
@pytest.mark.sample(3)
def test_a_batch_gives_the_tokens_of_single_decodes(search, seed):
    model, source = composed("host.max_length=24", eos=1.5, seed=seed), sources(32, 17)
    together = search(model, source, 20)
    lengths = {len(tokens) for tokens in together.tokens}
    assert len(lengths) > 2, "rows must end at different times, or nothing is shown"
    for row in range(32):
        alone = search(model, cut(source, row), 20)
        assert alone.tokens == [together.tokens[row]] and alone.ended == [together.ended[row]]
        assert alone.scores == pytest.approx([together.scores[row]], abs=1e-10)


@pytest.mark.parametrize("put", ["luong_local", "additive", "elu_linear", "soft", "grouped_query"])
def test_padding_has_no_influence_on_other_mechanisms(put):
    everywhere = f"overrides=[{{at: 'decoder.*.cross', put: {put}}}, {{at: 'encoder.*', put: {put}}}]"
    model, source = composed(everywhere, eos=1.5), sources(12)
    together = beam(model, source, 12)
    for row in range(12):
        alone = beam(model, cut(source, row), 12)
        assert alone.tokens == [together.tokens[row]]
        assert alone.scores == pytest.approx([together.scores[row]], abs=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_one_beam_is_greedy(seed):
    model, source = composed(eos=1.5, seed=seed), sources(8)
    for alpha in (0.0, 0.6, 2.0):
        one, other = beam(model, source, 14, beams=1, length_penalty=alpha), greedy(model, source, 14)
        assert one.tokens == other.tokens and one.ended == other.ended
        assert one.scores == pytest.approx(other.scores, abs=1e-10)


def test_scores_are_the_teacher_forced_log_probabilities():
    model, source = composed(eos=1.5), sources()
    for found in (greedy(model, source, 12), beam(model, source, 12, every=True)):
        for row, each in enumerate(found.hypotheses):
            for one in each:
                assert one.score == pytest.approx(forced(model, cut(source, row), one), abs=1e-10)
    assert {one.ended for each in found.hypotheses for one in each} == {True, False}


def test_with_room_for_all_the_best_of_all_is_found():
    model, source, longest = composed("host.vocab=6", eos=1.0), sources(4, vocab=6), 4
    strings = [s for n in range(longest) for s in itertools.product([3, 4, 5], repeat=n)]
    for row in range(4):
        one = cut(source, row)
        all_of_them = [
            Hypothesis(list(s), forced(model, one, Hypothesis(list(s), 0, True)), True) for s in strings
        ]
        best = max(all_of_them, key=lambda each: each.rank(0.6))
        assert beam(model, source, longest, beams=200).tokens[row] == best.tokens


def test_more_beams_find_more_probable_sequences():
    model, source = composed(eos=1.0), sources(16)
    totals = [sum(beam(model, source, 12, beams=k, length_penalty=0.0).scores) for k in (1, 4, 16)]
    assert totals[0] < totals[1] < totals[2]


@pytest.mark.parametrize("search", [greedy, beam])
def test_the_cut_at_the_greatest_length_is_reported(search):
    model, source = composed(eos=-1e9), sources(3)
    for asked, wanted in ((5, 5), (1, 1), (16, 16), (1000, 16)):
        found = search(model, source, asked)
        assert [len(tokens) for tokens in found.tokens] == [wanted] * 3 and not any(found.ended)
    found = search(composed(eos=1e9), source, 5)
    assert found.tokens == [[]] * 3 and all(found.ended) and found.scores == pytest.approx([0.0] * 3)


def test_padding_and_beginning_are_never_chosen():
    model, source = composed(eos=-1.0), sources()
    with torch.no_grad():
        model.head.bias[[model.pad, model.bos]] += 100
    for found in (greedy(model, source, 8), beam(model, source, 8), beam(model, source, 8, cached=False)):
        assert not {model.pad, model.bos} & set(itertools.chain(*found.tokens))
        assert all(score < -50 for score in found.scores)  # nothing is redistributed


@pytest.mark.parametrize("search", [greedy, beam])
def test_nothing_is_left_changed(search):
    model, source = composed(eos=1.5), sources()
    wanted = search(model, source, 10)
    model.train()
    model.encoder[1].eval()
    modes = [part.training for part in model.modules()]
    state, copy = torch.get_rng_state(), source.clone()
    found = search(model, source, 10)
    assert found == wanted  # without dropout
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(source, copy) and torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(LayoutMismatch, match="AZ407"):
        search(model, torch.ones(1, 17, dtype=torch.long), 10)
    assert [part.training for part in model.modules()] == modes


@pytest.mark.parametrize("search", [greedy, beam])
def test_edges(search):
    model = composed()
    assert search(model, torch.zeros(0, 4, dtype=torch.long), 5).tokens == []
    nothing = search(model, torch.zeros(1, 4, dtype=torch.long), 5)  # a source of padding alone
    assert len(nothing.tokens) == 1 and math.isfinite(nothing.scores[0])
    half = search(model.bfloat16(), sources(2), 4)
    assert len(half.tokens) == 2 and all(math.isfinite(score) for score in half.scores)
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    assert len(search(model, sources(2), 4).tokens) == 2


def test_without_room_nothing_is_found_but_the_beginning():
    model = composed()
    assert (
        greedy(model, sources(2), 0).tokens == [[], []] and greedy(model, sources(2), 0).ended == [False] * 2
    )
    assert beam(model, sources(2), 0).tokens == [[], []] and beam(model, sources(2), 0).ended == [False] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("search", [greedy, beam])
def test_a_gpu_gives_the_tokens_of_the_cpu(search):
    model, source = composed(eos=1.5), sources()
    wanted = search(model, source, 10).tokens
    assert search(model.cuda(), source.cuda(), 10).tokens == wanted


# The benchmark


SIZES = {"DIM": 16, "DEPTH": 1, "HEADS": 2, "HIDDEN": 32, "VOCABULARY": 50}


@pytest.fixture
def small(monkeypatch):
    for name, value in SIZES.items():
        monkeypatch.setattr(decoding, name, value)


def test_the_benchmark_gives_everybody_the_same_work(small):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    figures = decoding.measure(threads=1, rounds=2, batch=3, tokens=5)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert list(figures["tokens_per_second"]) == ["attnzoo", "nn.Transformer", "x-transformers"]
    middle, low, high = figures["tokens_per_second"]["attnzoo"]
    assert 0 < low <= middle <= high
    ratio = middle / figures["tokens_per_second"]["nn.Transformer"][0]
    assert figures["over"]["nn.Transformer"] == pytest.approx(ratio)
    assert figures["machine"]["threads"] == 1 and figures["layers"] == [1, 1]


def test_without_x_transformers_its_row_says_how_to_install_it(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "x_transformers", None)
    small_measure = partial(decoding.measure, rounds=2, batch=2, tokens=4)
    monkeypatch.setattr(decoding, "measure", small_measure)
    made = CliRunner().invoke(app, ["bench", "decode", "--threads", "1"])
    assert made.exit_code == 0 and "not installed: pip install x-transformers" in made.stdout
    assert "nn.Transformer" in made.stdout and "GFLOP/s" in made.stdout
    told = json.loads(CliRunner().invoke(app, ["bench", "decode", "--threads", "1", "--json"]).stdout)
    assert told["over"]["x-transformers"] is None and told["over"]["nn.Transformer"] > 0

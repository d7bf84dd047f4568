"""Sequence tasks: every label computed again by slow code, the law of every draw, floors and ceilings, wrong options."""

import hashlib
import itertools
import math
import random
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from attnzoo.data.chance import Chance, step_seeds
from attnzoo.data.sequences import (
    IGNORE,
    SEQUENCES,
    STRINGS,
    is_sequences,
    is_strings,
    load_sequences,
    load_strings,
)
from attnzoo.data.sequences.bounds import counted, recall_accuracy, regression_error
from attnzoo.data.sequences.fitting import SmoothMap
from attnzoo.data.sequences.markov import posterior
from attnzoo.data.sequences.options import MOST_NUMBERS, options
from attnzoo.data.sequences.recall import RecallOptions, distinct, laid_out
from attnzoo.data.sequences.regression import gradient_step, ridge
from attnzoo.data.sequences.switching import RULES, streams
from attnzoo.errors import DataError

SMALL = {
    "recall": "recall:train=300,test=200",
    "markov": "markov:train=300,test=200",
    "regression": "regression:train=300,test=200",
    "switching": "switching:train=300,test=200",
    "fitting": "fitting:train=300,test=200",
}


def fits(counts, shares) -> bool:
    """Whether counts could come from these shares: χ² within five standard deviations of its mean."""
    counts, shares = np.asarray(counts, float), np.asarray(shares, float)
    assert math.isclose(shares.sum(), 1, abs_tol=1e-9)
    expected, freedom = counts.sum() * shares, len(shares) - 1
    return ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


def digest(*tensors: torch.Tensor) -> str:
    """The first half of the SHA-256 of whole numbers."""
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()[:32]


# All tasks


@pytest.mark.parametrize("task", SEQUENCES)
def test_a_task_says_what_it_gives(task):
    data = load_sequences(SMALL[task], seed=3)
    assert data.name == SMALL[task] and (len(data.train), len(data.test)) == (300, 200)
    for side in (data.train, data.test):
        inputs, targets = side.batch(torch.tensor([5, 0, 5]))
        assert inputs.shape[:2] == targets.shape[:2] == (3, data.length)
        assert torch.equal(inputs[0], inputs[2]) and torch.equal(inputs[1], side.inputs[0])
        if data.regression:
            assert data.vocab is None and inputs.dtype == targets.dtype == torch.float32
            assert inputs.shape[2] == data.width and targets.shape[2] == data.outputs
            asked = ~targets.isnan()
            assert torch.equal(asked.all(dim=2), asked.any(dim=2))
        else:
            assert data.width is None and inputs.dtype == targets.dtype == torch.int64
            assert inputs.min() >= 0 and inputs.max() < data.vocab == data.outputs == len(set(data.words))
            asked = targets != IGNORE
            assert targets[asked].min() >= 0 and targets.max() < data.outputs
        assert asked.any(dim=1).all()
        inputs.zero_(), targets.zero_()  # a batch is a copy
        assert side.inputs.any() and side.targets.any()


@pytest.mark.parametrize("task", SEQUENCES)
def test_the_seed_is_all_that_matters(task):
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    one = load_sequences(SMALL[task], seed=7)
    torch.manual_seed(123)
    again, other = load_sequences(SMALL[task], seed=7), load_sequences(SMALL[task], seed=8)
    for side in ("train", "test"):
        a, b, c = (getattr(data, side) for data in (one, again, other))
        assert torch.equal(a.inputs, b.inputs) and torch.equal(
            a.targets.nan_to_num(9), b.targets.nan_to_num(9)
        )
        assert not torch.equal(a.inputs, c.inputs)
    more = load_sequences(SMALL[task].replace("300", "350"), seed=7)
    assert torch.equal(more.train.inputs[:300], one.train.inputs)
    torch.set_rng_state(state[0])
    load_sequences(SMALL[task])
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1] and np.random.get_state()[1].tolist() == state[2]


@pytest.mark.parametrize("task", SEQUENCES)
def test_sides_are_drawn_apart(task):
    data = load_sequences(task)
    train, test = (Counter(map(bytes, side.inputs.flatten(1).numpy())) for side in (data.train, data.test))
    shared = sum(test[each] for each in train.keys() & test.keys())
    if task == "markov":  # a chain that stays where it is, or goes round, is drawn again and again
        assert shared < 0.1 * len(data.test)
    elif task == "switching":
        assert shared < 0.01 * len(data.test)
    else:
        assert shared == 0 and len(train) == len(data.train) and len(test) == len(data.test)


@pytest.mark.parametrize(
    "task,expected",
    [
        ("recall", "1131bca2c022b8ef45f5a75e735ca236"),
        ("markov", "5887512a13c7c7dd85eba70286ca7986"),
        ("switching", "c126297488712d344cfce5cf00e87f1d"),
    ],
)
def test_sequences_stay_what_they_are(task, expected):
    """Results that were measured belong to these very sequences."""
    data = load_sequences(SMALL[task], seed=1)
    assert digest(data.train.inputs, data.train.targets, data.test.inputs, data.test.targets) == expected


@pytest.mark.parametrize("task", [*SEQUENCES, *STRINGS])
def test_loading_takes_no_time(task):
    start = time.process_time()
    load_strings(task) if is_strings(task) else load_sequences(task)
    assert time.process_time() - start < 2


def test_what_must_not_look_ahead_says_so():
    """Where a later input is the answer: the next token, everywhere but after the last."""
    for name in ("markov", "switching", "markov:every=false", "recall", "regression", "fitting"):
        data = load_sequences(name)
        if data.vocab and data.causal:
            asked = data.test.targets[:, :-1] != IGNORE
            assert torch.equal(data.test.targets[:, :-1][asked], data.test.inputs[:, 1:][asked])
        assert data.causal == (name in ("markov", "switching"))


# Strings


@pytest.mark.parametrize("task", STRINGS)
def test_strings_are_copied_reversed_and_sorted(task):
    data = load_strings(f"{task}:train=3000,test=300", seed=2)
    assert data.source.size == data.target.size == 16
    assert (len(data.train), len(data.test)) == (3000, 300)
    for side in (data.train, data.test):
        for source, target, ids, answer in zip(
            side.source_texts, side.target_texts, side.sources, side.targets, strict=True
        ):
            letters = source.split(" ")
            assert set(letters) <= set("abcdefghijkl")
            expected = {"copy": letters, "reverse": letters[::-1], "sort": sorted(letters)}[task]
            assert target.split(" ") == expected
            assert data.source.encode(source) == list(ids) and data.target.encode(target) == list(answer)


@pytest.mark.parametrize(
    "name", ["reverse", "sort:symbols=2,length=6,train=500,test=40", "copy:symbols=3,length=4,test=30"]
)
def test_no_string_is_on_both_sides_and_every_length_on_each(name):
    data = load_strings(name, seed=5)
    train, test = set(data.train.sources), set(data.test.sources)
    assert not train & test and len(test) == len(data.test)
    longest = max(map(len, test))
    assert {len(s) for s in train} == {len(s) for s in test} == set(range(1, longest + 1))
    spread = Counter(len(s) for s in data.train.sources)
    assert max(spread.values()) - min(spread.values()) <= 1
    assert data.notes  # short strings are few


def test_shares_of_short_strings_go_to_longer_ones():
    data = load_strings("reverse:symbols=2,length=4,test=15,train=200")
    assert Counter(map(len, data.test.sources)) == {1: 1, 2: 2, 3: 4, 4: 8}  # half of 2, 4, 8, 16
    with pytest.raises(DataError, match="AZ715") as caught:
        load_strings("reverse:symbols=2,length=4,test=16")
    assert "test=15" in str(caught.value)
    assert not load_strings("reverse:symbols=26,length=3,test=15").notes


def test_strings_are_uniform_and_stay_what_they_are():
    data = load_strings("copy:train=20000", seed=4)
    counts = Counter(itertools.chain.from_iterable(data.train.sources))
    assert set(counts) == set(range(4, 16)) and fits(list(counts.values()), [1 / 12] * 12)
    texts = "\n".join(data.train.source_texts + data.test.source_texts)
    assert hashlib.sha256(texts.encode()).hexdigest()[:32] == "fa9d9644f68807a96b986abed759feae"
    assert load_strings("sort:train=20000", seed=4).test.source_texts == data.test.source_texts
    assert load_strings("copy:train=20000", seed=5).test.source_texts != data.test.source_texts


# Recall


def test_recall_by_hand():
    """The example of the paper's code: V = 12, n = 2, L = 16."""
    parts = (torch.tensor([row]) for row in ([2, 4], [8, 7], [4, 1]))
    inputs, targets = laid_out(*parts, torch.zeros(1, 16, dtype=torch.int64))
    assert inputs.tolist() == [[2, 8, 4, 7, 0, 0, 4, 0, 0, 0, 0, 0, 2, 0, 0, 0]]
    assert targets.tolist() == [[*[IGNORE] * 6, 7, *[IGNORE] * 5, 8, *[IGNORE] * 3]]
    parts = (torch.tensor([row]) for row in ([2, 4], [8, 7], [1, 0]))
    inputs, targets = laid_out(*parts, torch.zeros(1, 12, dtype=torch.int64), passes=2)
    assert inputs.tolist() == [[2, 8, 4, 7, 2, 8, 4, 7, 4, 0, 2, 0]]
    assert targets.tolist() == [[*[IGNORE] * 8, 7, IGNORE, 8, IGNORE]]


@pytest.mark.parametrize(
    "name",
    ["recall", "recall:pairs=8,power=1", "recall:noise=true", "recall:pairs=5,length=20,vocab=21",
     "recall:pairs=3,passes=3,noise=true"],
)  # fmt: skip
def test_recall_looked_up(name):
    o = options(RecallOptions, name)
    data = load_sequences(f"{name}{',' if ':' in name else ':'}train=200,test=200", seed=6)
    n, half = o.pairs, o.vocab // 2
    for inputs, targets in zip(data.train.inputs.tolist(), data.train.targets.tolist(), strict=True):
        keys, values = inputs[0 : 2 * n : 2], inputs[1 : 2 * n : 2]
        context = 2 * n * o.passes
        assert inputs[:context] == inputs[: 2 * n] * o.passes
        assert len(set(keys)) == len(set(values)) == n
        assert min(keys) >= 1 and max(keys) < half <= min(values) and max(values) < o.vocab
        table = dict(zip(keys, values, strict=True))
        asked = [i for i, target in enumerate(targets) if target != IGNORE]
        assert sorted(inputs[i] for i in asked) == sorted(keys)
        assert all(i >= context and i % 2 == 0 and targets[i] == table[inputs[i]] for i in asked)
        rest = [inputs[i] for i in range(context, o.length) if i not in asked]
        assert any(rest) == o.noise
    assert data.words[0] == "·" and data.words[1] == "k1" and data.words[half] == f"v{half}"


@given(st.integers(1, 12), st.integers(0, 40), st.integers(0, 2**32))
def test_distinct_is_fisher_and_yates(n, more, seed):
    uniform = Chance(step_seeds(seed, 0, torch.arange(5))).uniform(n)
    expected = []
    for row in uniform:
        deck = list(range(n + more))
        for i in range(n):
            j = i + int(row[i] * (n + more - i))
            deck[i], deck[j] = deck[j], deck[i]
        expected.append(deck[:n])
    assert distinct(uniform, n + more).tolist() == expected


def test_recall_draws_keys_values_and_gaps_by_their_laws():
    data = load_sequences("recall:pairs=2,length=12,vocab=14,train=20000", seed=9)
    inputs, targets = data.train.inputs, data.train.targets
    pairs = Counter(map(tuple, inputs[:, 0:4:2].tolist()))
    assert len(pairs) == 30 and fits(list(pairs.values()), [1 / 30] * 30)
    pairs = Counter(map(tuple, inputs[:, 1:4:2].tolist()))
    assert len(pairs) == 42 and fits(list(pairs.values()), [1 / 42] * 42)
    p = np.arange(1, 5) ** (0.01 - 1)
    p /= p.sum()
    slots = [((inputs[:, 4:] == inputs[:, i, None]).long().argmax(dim=1) // 2).tolist() for i in (0, 2)]
    found = Counter(zip(*slots, strict=True))
    orders = list(itertools.permutations(range(4), 2))  # the second is drawn from what the first left
    assert fits([found[order] for order in orders], [p[i] * p[j] / (1 - p[i]) for i, j in orders])
    assert (targets != IGNORE).sum(dim=1).eq(2).all()


# Markov chains


def slow_posterior(tokens: list[int], symbols: int, order: int, alpha: float) -> list[list[float]]:
    """Position by position, from a dictionary of what followed what."""
    seen: dict = defaultdict(lambda: [0] * symbols)
    shown = []
    for t in range(len(tokens)):
        if t >= order - 1:
            seen[tuple(tokens[t - order + 1 : t])][tokens[t]] += 1
        parents = tuple(tokens[t - order + 2 : t + 1])
        counts = seen[parents] if t >= order - 2 else [0] * symbols
        shown.append([(alpha + c) / (symbols * alpha + sum(counts)) for c in counts])
    return shown


@pytest.mark.parametrize("symbols,order,alpha", [(3, 2, 0.3), (2, 3, 1.0), (4, 4, 0.05), (2, 6, 2.0)])
def test_posterior_counted_slowly(symbols, order, alpha):
    name = f"markov:symbols={symbols},order={order},alpha={alpha},length=40,train=20,test=1"
    tokens = load_sequences(name, seed=1).train.inputs
    found = posterior(tokens, symbols, order, alpha)
    expected = [slow_posterior(row, symbols, order, alpha) for row in tokens.tolist()]
    assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-12
    assert (found.sum(dim=-1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("every", ["true", "false"])
def test_markov_asks_where_it_should(order, every):
    data = load_sequences(f"markov:order={order},length=12,every={every},train=50,test=1")
    inputs, targets = data.train.inputs, data.train.targets
    first = order - 2 if every == "true" else 11
    assert (targets[:, :first] == IGNORE).all() and (targets[:, first:] != IGNORE).all()
    asked = slice(first, 11)
    assert torch.equal(targets[:, asked], inputs[:, first + 1 :])
    all_asked = load_sequences(f"markov:order={order},length=12,train=50,test=1").train
    assert torch.equal(all_asked.inputs, inputs) and torch.equal(all_asked.targets[:, -1], targets[:, -1])


@pytest.mark.parametrize(
    "symbols,order,tokens,alpha", [(2, 2, 5, 0.3), (3, 2, 4, 0.3), (2, 3, 5, 0.7), (2, 2, 5, 5.0)]
)
def test_markov_has_the_law_of_dirichlet_chains(symbols, order, tokens, alpha):
    """A sequence has probability S^(1-n) Π over parents of B(α + N) / B(α): π integrated out."""
    data = load_sequences(
        f"markov:symbols={symbols},order={order},length={tokens - 1},alpha={alpha},train=40000,test=1", seed=2
    )
    drawn = torch.cat((data.train.inputs, data.train.targets[:, -1:]), dim=1)
    found = Counter(map(tuple, drawn.tolist()))

    def log_beta(parts):
        return sum(map(math.lgamma, parts)) - math.lgamma(sum(parts))

    def probability(sequence):
        counts = defaultdict(lambda: [0] * symbols)
        for t in range(order - 1, tokens):
            counts[sequence[t - order + 1 : t]][sequence[t]] += 1
        rows = (log_beta([alpha + c for c in row]) - log_beta([alpha] * symbols) for row in counts.values())
        return symbols ** (1 - order) * math.exp(sum(rows))

    every = list(itertools.product(range(symbols), repeat=tokens))
    assert fits([found[each] for each in every], [probability(each) for each in every])


def test_markov_chains_are_those_that_a_transition_matrix_makes():
    """Against chains drawn with π: how often x_{t+1} = x_t, and how often a transition repeats the one before, at each t."""
    generator, count, length = np.random.default_rng(0), 20_000, 20
    pi = generator.dirichlet([0.3] * 3, size=(count, 3)).cumsum(axis=-1)
    x = np.zeros((count, length + 1), dtype=int)
    x[:, 0] = generator.integers(0, 3, count)
    for t in range(length):
        row = pi[np.arange(count), x[:, t]]
        x[:, t + 1] = (generator.random(count)[:, None] >= row[:, :2]).sum(axis=1)
    data = load_sequences(f"markov:length={length},train={count},test=1", seed=3).train
    ours = torch.cat((data.inputs, data.targets[:, -1:]), dim=1).numpy()
    for statistic in (
        lambda z: z[:, 1:] == z[:, :-1],
        lambda z: z[:, 2:] == z[:, :-2],
        lambda z: z[:, 1:] == 0,
    ):
        a, b = statistic(x).mean(axis=0), statistic(ours).mean(axis=0)
        assert np.abs(a - b).max() < 5 * math.sqrt(2 * 0.25 / count)
    marginals = np.stack([(ours == s).mean(axis=0) for s in range(3)])
    assert np.abs(marginals - 1 / 3).max() < 5 * math.sqrt(2 / 9 / count)  # by symmetry, at every position


def test_no_predictor_beats_the_posterior_and_it_is_calibrated():
    data = load_sequences("markov", seed=4)
    inputs, targets = data.test.inputs, data.test.targets
    best = posterior(inputs, 3, 2, 0.3)
    picked = best.gather(2, targets[..., None])[..., 0].log()
    entropy = -(best * best.log()).sum(dim=-1)
    spread = (-picked - entropy).mean(dim=1).std() / math.sqrt(len(inputs))
    assert abs(float((-picked - entropy).mean())) < 4 * spread  # its loss is what it expects it to be
    floor = -picked.mean()
    for alpha in (0.1, 1.0):
        assert -posterior(inputs, 3, 2, alpha).gather(2, targets[..., None]).log().mean() > floor + 0.005
    frequencies = [counted(inputs, targets, w)[1] for w in (1, 2, 3)]
    assert frequencies[0] > frequencies[1] > frequencies[2] > floor + 0.1


# Linear regression


@pytest.mark.parametrize("name", ["regression", "regression:dim=3,examples=3", "regression:dim=1,examples=2"])
def test_regression_without_noise_is_solved_by_least_squares(name):
    data = load_sequences(f"{name}{',' if ':' in name else ':'}train=200,test=10", seed=2)
    inputs, targets = data.train.inputs, data.train.targets
    assert targets[:, :-1].isnan().all() and not targets[:, -1].isnan().any()
    assert (inputs[:, -1, -1] == 0).all() and (inputs[:, :-1, -1] != 0).all()
    error = (ridge(inputs, 0.0) - targets[:, -1, 0]).abs()
    assert error.median() < 1e-5 and (error < 1e-5).double().mean() > 0.9  # few examples are nearly dependent


def test_ridge_is_the_posterior_mean():
    """By the joint normal distribution of y and y_q given the x: Cov(y_q, y) Cov(y, y)⁻¹ y."""
    inputs = load_sequences("regression:dim=4,examples=7,noise=0.5,train=20,test=1").train.inputs
    for row, found in zip(inputs.double().numpy(), ridge(inputs, 0.5).tolist(), strict=True):
        x, y, query = row[:-1, :-1], row[:-1, -1], row[-1, :-1]
        expected = query @ x.T @ np.linalg.inv(x @ x.T + 0.25 * np.eye(7)) @ y
        assert abs(found - expected) < 1e-10


def test_regression_has_the_moments_it_should():
    data = load_sequences("regression:dim=3,examples=4,noise=2.0,train=50000,test=1", seed=1).train
    x, y = (
        data.inputs[..., :-1].double(),
        torch.cat((data.inputs[:, :-1, -1:], data.targets[:, -1:]), dim=1).double(),
    )
    rows = torch.cat((x.flatten(1), y.flatten(1)), dim=1)
    assert rows.mean(dim=0).abs().max() < 5 * math.sqrt(7 / 50_000)
    covariance = rows.T.cov()
    assert (covariance[:15, :15] - torch.eye(15)).abs().max() < 0.03
    assert (covariance[15:, 15:] - 7 * torch.eye(5)).abs().max() < 0.3  # 3 of w'x, 4 of the noise
    product = (y[:, 0] * y[:, 1])[:, 0] * (x[:, 0] * x[:, 1]).sum(dim=1)
    assert abs(float(product.mean()) - 3) < 0.3  # E (w'x)(w'z)(x'z) = E (x'z)² = d: one w in a sequence


def test_regression_with_variances_that_differ():
    """κ = 16: variances 4, 1, 1/4; the best predictor is the same, and what y is made of too."""
    data = load_sequences("regression:dim=3,examples=4,condition=16,train=50000,test=1", seed=1).train
    plain = load_sequences("regression:dim=3,examples=4,train=50000,test=1", seed=1).train
    x = data.inputs[..., :-1].double()
    near = torch.tensor([4.0, 1.0, 0.25]).double()
    assert (x.flatten(0, 1).var(dim=0) / near - 1).abs().max() < 0.02
    torch.testing.assert_close(x / near.sqrt(), plain.inputs[..., :-1].double(), rtol=1e-6, atol=0)
    assert (ridge(data.inputs, 0.0) - data.targets[:, -1, 0]).abs().median() < 1e-5
    one = load_sequences("regression:dim=1,condition=9,train=20,test=1").train
    assert torch.equal(one.inputs, load_sequences("regression:dim=1,train=20,test=1").train.inputs)


def test_two_heads_come_to_a_debiased_step():
    """He et al.'s two heads, γ = ± 0.05 and μ = ± 1 / 2γ, on one sequence whose examples are not centred."""
    generator, gamma = torch.Generator().manual_seed(0), 0.05
    x = torch.randn(1, 4001, 5, generator=generator, dtype=torch.float64) + 1.0
    w = torch.randn(5, 1, generator=generator, dtype=torch.float64)
    inputs = torch.cat([x, x @ w], dim=-1)
    inputs[:, -1, -1] = 0
    scores, y = (x[0, :-1] @ x[0, -1]) * gamma, inputs[0, :-1, -1]
    two = ((scores.softmax(0) - (-scores).softmax(0)) * y).sum() / (2 * gamma)
    step, biased = gradient_step(inputs, debiased=True), gradient_step(inputs)
    assert abs(two - step) < 0.01 * abs(step) and abs(two - biased) > 0.05 * abs(step)
    by_hand = torch.tensor(
        [[[1.0, 2.0], [3.0, 4.0], [2.0, 0.0]]]
    )  # (1·2 + 3·4) / 2 · 2; centred (-2 + 4) / 2 · 2
    assert gradient_step(by_hand).item() == 14 and gradient_step(by_hand, debiased=True).item() == 2


# Task switching


def slow_labels(tokens: list[int], symbols: int) -> list[tuple[int, int] | None]:
    """For each position the next symbol and its rule, if no control token comes, from the tokens up to it alone."""
    shown: list[tuple[int, int] | None] = []
    for t in range(len(tokens)):
        stream = tokens[: t + 1]
        controls = [i for i, token in enumerate(stream) if token >= symbols]
        if not controls:
            shown.append(None)
            continue
        at, rule = controls[-1], stream[controls[-1]] - symbols
        said = [token for token in stream if token < symbols]
        if rule == 2:
            segment = stream[controls[-2] + 1 if len(controls) > 1 else 0 : at]
            done = t - at
            answer = segment[::-1][done] if done < len(segment) else None
        else:
            answer = (said[-1] + (1, said[-2], None, stream[at - 1])[rule]) % symbols
        shown.append(None if answer is None else (answer, rule))
    return shown


@pytest.mark.parametrize(
    "options", ["", "symbols=5,switch=0.4", "switch=0", "switch=1,length=30", "symbols=2,length=4"]
)
def test_every_label_of_switching_again(options):
    data = load_sequences(f"switching:{options}{',' * bool(options)}train=300,test=1", seed=3)
    symbols, forced, asked = data.vocab - 4, 0, Counter()
    rows = zip(
        data.train.inputs.tolist(), data.train.targets.tolist(), data.train.kinds.tolist(), strict=True
    )
    for tokens, targets, kinds in rows:
        assert tokens[0] < symbols and tokens[1] < symbols <= tokens[2]
        for t, label in enumerate(slow_labels(tokens, symbols)):
            following = tokens[t + 1] if t + 1 < len(tokens) else None
            if label is None:
                assert (targets[t], kinds[t]) == (IGNORE, -1)
                assert t < 1 or following is None or following >= symbols  # what R said is all said
                forced += t > 1
            elif following is not None and following >= symbols or targets[t] == IGNORE:
                assert (targets[t], kinds[t]) == (IGNORE, -1) and tokens[t] < symbols
                assert following is None or following >= symbols
            else:
                assert (targets[t], kinds[t]) == label
                asked[label[1]] += 1
    assert set(asked) == {0, 1, 2, 3} and (forced or "length=4" in options)


def test_switching_by_hand():
    """3 5 I 6 7 A 13 4 R 4 13 C 10 7: every rule once, modulo 16; R ends by itself."""
    tokens = [3, 5, 16, 6, 7, 17, 13, 4, 18, 4, 13, 19, 10, 7]
    never, ever = 0.9, 0.1  # against switch = 0.5
    uniform = torch.zeros(1, len(tokens), 2)
    for t, token in enumerate(tokens):
        uniform[0, t, 0] = ever if 16 <= token < 19 else never
        uniform[0, t, 1] = (token - 16 + 0.5) / 4 if token >= 16 else (token + 0.5) / 16
    found, kinds = streams(uniform, 16, 0.5)
    assert found.tolist() == [tokens]
    assert kinds.tolist() == [[-1, -1, -1, 0, 0, -1, 1, 1, -1, 2, 2, -1, 3, 3]]


def test_switching_switches_as_often_as_said():
    data = load_sequences("switching:switch=0.2,length=60,train=5000", seed=1)
    inputs, kinds = data.train.inputs, data.train.kinds
    control = inputs >= 16
    assert not (control[:, 1:] & control[:, :-1]).any()
    free = (kinds[:, :-1] != 2) & ~control[:, :-1] & ~control[:, 1:].roll(1, 1)
    last = (torch.where(control, torch.arange(60), -1).cummax(dim=1).values).clamp(min=0)
    free = ~control & (inputs.gather(1, last) != 18) & (torch.arange(60) > 2)
    rate = control[:, 1:][free[:, :-1]].double().mean()
    assert abs(float(rate) - 0.2) < 5 * math.sqrt(0.16 / int(free.sum()))
    assert fits(torch.bincount(inputs[control] - 16).tolist(), [0.25] * 4)
    assert data.kinds == RULES == tuple(data.words[16:]) and data.notes


# Function fitting


def test_fitting_is_one_map_for_both_sides():
    data = load_sequences("fitting:train=100,test=50", seed=5)
    made = SmoothMap.drawn(5, 2, 8, positions=True)
    for side in (data.train, data.test):
        assert torch.equal(made(side.inputs).float(), side.targets)
        assert side.inputs.min() >= 0 and side.inputs.max() < 1
    assert not torch.allclose(
        SmoothMap.drawn(6, 2, 8, positions=True)(data.test.inputs).float(), data.test.targets
    )


def test_fitting_commutes_with_permutations_unless_it_depends_on_positions():
    x, order = torch.rand(10, 8, 2), torch.randperm(8)
    free, placed = (SmoothMap.drawn(1, 2, 8, positions=positions) for positions in (False, True))
    assert (free(x[:, order]) - free(x)[:, order]).abs().max() < 1e-12
    assert (placed(x[:, order]) - placed(x)[:, order]).abs().max() > 0.1
    assert load_sequences("fitting:positions=false,train=9,test=9").train.targets.shape == (9, 8, 2)


def test_context_of_fitting_by_its_definition():
    made, x = SmoothMap.drawn(2, 1, 3, positions=False), torch.rand(4, 3, 1, dtype=torch.float64)
    points, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(60))
    points, weights = (points + 1) / 2, weights / 2

    def wave(one, other):  # Σ_k cos(a_k x_i + b_k x_j + φ_k)
        angle = one[..., None] * made.seen[0, 0] + other[..., None] * made.met[0, 0] + made.phases[1, 0]
        return angle.cos().sum(dim=-1)

    found = made.context(x)[..., 0]
    for b, i in itertools.product(range(4), range(3)):
        one = x[b, i, 0]
        mean = (weights * wave(one.expand(60), points)).sum()
        total = sum(wave(one, x[b, j, 0]) - mean for j in range(3) if j != i)
        assert abs(float(total * math.sqrt(2 / 4 / 2) - found[b, i])) < 1e-10


def test_who_sees_one_vector_of_fitting_learns_nothing_of_the_context():
    """With two vectors, the context's mean over the other one is 0 whatever the first is; frequencies up to 10."""
    points, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(80))
    for seed in range(5):
        made = SmoothMap.drawn(seed, 1, 2, positions=True)
        for first in (0.0, 0.3, 1.0):
            x = torch.stack((torch.full((80,), first), (points + 1) / 2), dim=1)[..., None]
            assert abs(float((weights / 2 * made.context(x)[:, 0, 0]).sum())) < 1e-10
    data = load_sequences("fitting", seed=0)
    context = SmoothMap.drawn(0, 2, 8, positions=True).context(data.test.inputs) / math.sqrt(3)
    share = context.var() / data.test.targets.var(dim=(0, 1)).mean()
    assert share > 0.2  # what a model that sees one vector cannot explain


# What a model with a short window can reach


def test_recall_ceiling_by_hand():
    parts = (torch.tensor([row]) for row in ([2, 4], [8, 7], [4, 1]))
    inputs, targets = laid_out(
        *parts, torch.zeros(1, 16, dtype=torch.int64)
    )  # asked: 7 (at 3) at 6, 8 (at 1) at 12
    ceilings = {
        1: (1 / 6 + 1 / 6) / 2,
        3: (1 / 6 + 1 / 6) / 2,
        4: (1 + 1 / 6) / 2,
        10: (1 + 1 / 5) / 2,
        11: (1 + 1 / 5) / 2,
        12: 1,
    }
    for window, ceiling in ceilings.items():
        assert recall_accuracy(inputs, targets, window, 12) == pytest.approx(ceiling, abs=1e-12), window


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("window", [1, 4, 9, 16, 30])
def test_recall_ceiling_is_reached_and_not_passed(window, passes):
    """By one who answers what is in sight and else guesses a value that is not."""
    data, context = (
        load_sequences(f"recall:pairs=4,length=32,vocab=34,test=4000,passes={passes}", seed=2),
        8 * passes,
    )
    guess, right = random.Random(1), []
    for inputs, targets in zip(data.test.inputs.tolist(), data.test.targets.tolist(), strict=True):
        for t, target in enumerate(targets):
            if target != IGNORE:
                shown = range(max(0, t - window + 1), t)
                table = {inputs[i]: inputs[i + 1] for i in shown if i % 2 == 0 and i < context}
                values = {inputs[i] for i in shown if i % 2 and i < context}
                left = [v for v in range(17, 34) if v not in values]
                right.append((table.get(inputs[t]) or guess.choice(left)) == target)
    ceiling = recall_accuracy(data.test.inputs, data.test.targets, window, 34, passes)
    error = math.sqrt(0.25 / len(right))
    assert np.mean(right) < ceiling + 4 * error
    if window % 2:  # otherwise a value may come first in the window whose key is out of sight
        assert np.mean(right) > ceiling - 4 * error


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize(
    "name", ["markov:length=9", "switching:length=12", "recall:pairs=2,length=10,vocab=12"]
)
def test_counting_again(name, window):
    data = load_sequences(f"{name},train=1,test=400")
    groups = defaultdict(Counter)
    for inputs, targets in zip(data.test.inputs.tolist(), data.test.targets.tolist(), strict=True):
        for t, target in enumerate(targets):
            if target != IGNORE:
                groups[t, tuple(inputs[max(0, t - window + 1) : t + 1])][target] += 1
    total = sum(sum(c.values()) for c in groups.values())
    best = sum(max(c.values()) for c in groups.values()) / total
    loss = -sum(n * math.log(n / sum(c.values())) for c in groups.values() for n in c.values()) / total
    assert counted(data.test.inputs, data.test.targets, window) == pytest.approx((best, loss), abs=1e-12)


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("window", [1, 3, 6, 9, 21])
def test_regression_floor_is_what_ridge_on_the_window_reaches(noise, window):
    data = load_sequences(f"regression:noise={noise},test=8000", seed=3)
    inputs, answers = data.test.inputs, data.test.targets[:, -1, 0]
    floor = regression_error(inputs, window, noise)
    seen = inputs[:, -window:]
    error = (ridge(seen, noise) - answers) ** 2 if window > 1 else answers**2
    assert abs(float(error.mean()) - floor) < 4 * float(error.std()) / math.sqrt(8000) + 1e-6
    if noise == 0:
        assert floor == pytest.approx(max(0, 5 - (window - 1)), abs=0.15)
    if window < 21:
        assert floor > regression_error(inputs, window + 1, noise) - 1e-9


# Wrong options

WRONG = [
    ("recall:pair=4", "did you mean `pairs`?"),
    ("recall:pairs", "not `option=value`"),
    ("recall:", "not `option=value`"),
    ("recall:pairs=4,", "not `option=value`"),
    ("recall:pairs=4,pairs=5", "twice"),
    ("recall:pairs=four", "a whole number from 1 to 512"),
    ("recall:pairs=-1", "a whole number"),
    ("recall:pairs=4.0", "a whole number"),
    ("recall:pairs= 4", "a whole number"),
    ("recall:pairs=٤", "a whole number"),
    ("recall:pairs=0", "a whole number"),
    ("recall:pairs=9", "pairs=8 or fewer"),
    ("recall:pairs=6,passes=2", "length=36 or more, or pairs=5 or fewer"),
    ("recall:pairs=1,passes=16", "length=34 or more"),
    ("recall:length=31", "length=32"),
    ("recall:vocab=32", "vocab=64"),
    ("recall:power=nan", "a number from 0 to 1"),
    ("recall:power=1.5", "a number from 0 to 1"),
    ("recall:noise=True", "`true` or `false`"),
    ("recall:length=8192,vocab=16384", "are too many"),
    ("markov:symbols=17,order=3", "4,913 transitions"),
    ("markov:order=6,length=5", "too few for order 6"),
    ("markov:order=1", "a whole number from 2 to 6"),
    ("markov:alpha=0", "a number from 0.001"),
    ("regression:noise=-1", "a number from 0 to 100"),
    ("regression:dim=256,examples=2048", "are too many"),
    ("switching:switch=1.01", "a number from 0 to 1"),
    ("switching:kinds=2", "the options are `symbols=16`"),
    ("fitting:length=1", "a whole number from 2"),
    ("fitting:dim=64,length=1024", "at most 512 sequences"),
    ("reverse:symbols=27", "from 2 to 26"),
    ("sort:length=1,test=7", "test=6"),
    ("copy:lenght=7", "did you mean `length`?"),
]  # fmt: skip


@pytest.mark.parametrize("name,said", WRONG)
def test_wrong_options_are_named(name, said):
    with pytest.raises(DataError) as caught:
        load_strings(name) if is_strings(name) else load_sequences(name)
    assert caught.value.code == "AZ715" and said in str(caught.value)
    assert caught.value.diagnostics[0].help


def test_unknown_tasks_are_named():
    for load, name, said in (
        (load_sequences, "recal:pairs=4", "did you mean `recall`?"),
        (load_sequences, "reverse", "the sequence tasks are `recall`"),
        (load_strings, "revers", "did you mean `reverse`?"),
        (load_strings, "recall", "`copy`, `reverse` and `sort`"),
    ):
        with pytest.raises(DataError, match="AZ701") as caught:
            load(name)
        assert said in str(caught.value)
    assert is_sequences("recall:x") and not is_sequences("reverse") and not is_sequences("recallx")
    assert is_strings("sort:x") and not is_strings("sorted") and not is_strings("")


@given(st.text(alphabet="pairslength=,:0123456789.e-tru\x00é ", max_size=40))
@example("pairs=4,length=32,power=1e-2,noise=true")
def test_any_text_gives_options_or_an_error(text):
    try:
        found = options(RecallOptions, f"recall:{text}")
    except DataError as error:
        assert error.code == "AZ715"
    else:
        assert isinstance(found.pairs, int) and 1 <= found.pairs <= 512
        assert isinstance(found.power, float) and isinstance(found.noise, bool)


def test_options_keep_their_types():
    found = options(RecallOptions, "recall:pairs=4,length=32,power=1e-2,noise=true")
    assert found == RecallOptions(pairs=4, length=32, power=0.01, noise=True)
    assert options(RecallOptions, "recall") == RecallOptions()
    assert RecallOptions().train * RecallOptions().length <= MOST_NUMBERS

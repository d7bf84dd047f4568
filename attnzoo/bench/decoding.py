"""Greedy decoding side by side: ours, `torch.nn.Transformer` in the usual loop, x-transformers with its cache."""

import importlib
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.bench.speed import machine, quartiles
from attnzoo.hosts.decode import greedy
from attnzoo.hosts.positions import positions
from attnzoo.recipe import compose

DIM, DEPTH, HEADS, HIDDEN, VOCABULARY = 512, 6, 8, 2048, 8000
INSTALL = "pip install x-transformers"


class UsualLoop(nn.Module):
    """`torch.nn.Transformer` as its users drive it: each step runs the decoder over the whole prefix.

    The source is encoded once, and only the last position is projected to logits.

    Args:
        length: Longest sequence, in tokens.
    """

    def __init__(self, length: int):
        super().__init__()
        self.embed_source = nn.Embedding(VOCABULARY, DIM)
        self.embed_target = nn.Embedding(VOCABULARY, DIM)
        self.positions = positions("sinusoidal", length, DIM)
        self.body = nn.Transformer(DIM, HEADS, DEPTH, DEPTH, HIDDEN, batch_first=True, norm_first=True)
        self.head = nn.Linear(DIM, VOCABULARY)

    @torch.no_grad()
    def generate(self, source: Tensor, steps: int) -> Tensor:
        """The most probable tokens, (b steps).

        Args:
            source: Ids (b n).
            steps: How many; none ends a sequence.
        """
        memory = self.body.encoder(self.positions(self.embed_source(source)))
        tokens = source.new_ones(len(source), 1)
        causal = nn.Transformer.generate_square_subsequent_mask(steps, source.device)
        for step in range(1, steps + 1):
            x = self.positions(self.embed_target(tokens))
            x = self.body.decoder(x, memory, tgt_mask=causal[:step, :step], tgt_is_causal=True)
            tokens = torch.cat([tokens, self.head(x[:, -1]).argmax(dim=-1, keepdim=True)], dim=1)
        return tokens[:, 1:]


def ours(length: int) -> Callable[[Tensor, int], Tensor]:
    """Greedy search of the recipe `transformer` with kept keys and values.

    Args:
        length: Longest sequence, in tokens.
    """
    host = {"dim": DIM, "layers": DEPTH, "mlp_dim": HIDDEN, "vocab": VOCABULARY, "max_length": length}
    edits = [f"heads={HEADS}", *(f"host.{key}={value}" for key, value in host.items())]
    model: Any = compose("transformer", edits=edits).eval()
    with torch.no_grad():
        model.head.bias[model.eos] = -1e9  # so that nothing ends early
    return lambda source, steps: torch.tensor(greedy(model, source, steps).tokens)


def x_transformers(length: int) -> Callable[[Tensor, int], Tensor] | None:
    """x-transformers' `XTransformer` of the same size with its cache and PyTorch's fused kernel; None without it.

    Args:
        length: Longest sequence, in tokens.
    """
    try:
        library = importlib.import_module("x_transformers")
    except ImportError:
        return None
    sides = {
        "num_tokens": VOCABULARY,
        "depth": DEPTH,
        "heads": HEADS,
        "max_seq_len": length,
        "attn_flash": True,
    }
    both = {f"{side}_{key}": value for side in ("enc", "dec") for key, value in sides.items()}
    model = library.XTransformer(dim=DIM, **both).eval()
    return lambda source, steps: model.generate(
        source, source.new_ones(len(source), 1), steps, temperature=0.0, cache_kv=True
    )


def measure(
    threads: int = 2, rounds: int = 5, batch: int = 32, tokens: int = 32, seed: int = 0
) -> dict[str, Any]:
    """Time greedy decoding, encoder included, alternately after a warm-up; nobody ends a sequence early.

    Args:
        threads: Threads of torch while it runs.
        rounds: Rounds that are counted.
        batch: Sources at once.
        tokens: Of each source, and of what is made of it.
        seed: Of weights and sources.

    Returns:
        `tokens_per_second`: median, 25th and 75th percentile of `attnzoo`, `nn.Transformer` and `x-transformers`
        (None where it is not installed); `over`: how many times faster ours is than each; `machine`; what was measured.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the others' constructors have to say
            torch.manual_seed(seed)
            here = machine(torch.device("cpu"))
            length = 2 * tokens
            works: dict[str, Callable[[Tensor, int], Tensor] | None] = {
                "attnzoo": ours(length),
                "nn.Transformer": UsualLoop(length).eval().generate,
                "x-transformers": x_transformers(length),
            }
            source = torch.randint(4, VOCABULARY, (batch, tokens))
        there = {name: work for name, work in works.items() if work is not None}
        rates: dict[str, list[float]] = {name: [] for name in there}
        for turn in range(rounds + 1):
            for name in there if turn % 2 else reversed(there):
                began = time.perf_counter()
                made = there[name](source, tokens)
                seconds = time.perf_counter() - began
                assert made.shape == source.shape, f"{name} made {tuple(made.shape)}"
                rates[name].append(made.numel() / seconds)
    finally:
        torch.set_num_threads(before)
    figures = {name: quartiles(rates[name][1:]) if name in rates else None for name in works}
    first = statistics.median(rates["attnzoo"][1:])
    return {
        "tokens_per_second": figures,
        "over": {
            name: first / each[0] if each else None for name, each in figures.items() if name != "attnzoo"
        },
        "machine": asdict(here),
        "dim": DIM,
        "layers": [DEPTH, DEPTH],
        "batch": batch,
        "tokens": tokens,
        "vocabulary": VOCABULARY,
        "threads": threads,
        "rounds": rounds,
    }

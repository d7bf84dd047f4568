"""`attnzoo bench MODEL --against MODEL`: two models side by side; `bench mechanisms`: layers, as tokens grow."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from attnzoo.cli import completion
from attnzoo.cli.eval import Accelerate
from attnzoo.cli.list import AsJson


def bench(
    model: Annotated[
        str,
        typer.Argument(
            help="A timm model's name or a recipe; or `mechanisms`, `rivals`, `train`, `augment`, `decode`.",
            autocompletion=completion.benchmarks,
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            help="The baseline: a timm model's name, or a recipe; a mechanism, `softmax` unless said.",
            autocompletion=completion.recipes,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per forward in eval mode.")] = 8,
    train_batch: Annotated[int, typer.Option(min=1, help="Images per training step.")] = 4,
    rounds: Annotated[
        int | None, typer.Option(min=2, help="Alternating runs that are counted: 20, or 7 of mechanisms.")
    ] = None,
    family: Annotated[
        list[str] | None, typer.Option(help="Of `bench mechanisms`: all of a family; may be repeated.")
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Of `bench mechanisms`: sizes; 196 1024 4096 16384 unless said."),
    ] = None,
    dim: Annotated[int, typer.Option(min=1, help="Of `bench mechanisms`: channels.")] = 384,
    heads: Annotated[int, typer.Option(min=1, help="Of `bench mechanisms`: heads.")] = 6,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Of `bench mechanisms`: a folder for the figures as CSV and drawn, or the PNG, SVG or PDF."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    accelerate: Accelerate = False,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="Of `bench mechanisms`: which ones, by name or as `{use: linformer, with: {rank: 64}}`.",
            autocompletion=completion.components,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare speed and memory of two models: medians of alternating runs, and their ratios.

    `bench mechanisms NAME...` lets single layers take turns at several numbers of tokens: times, memory, how they grow,
    and from how many tokens on each is faster than the baseline.

    `bench rivals` lets ours take turns with the same layers in timm and in
    other packages.

    `bench train` holds our training loop against torchvision's per-image pipeline and a bare loop, `bench
    augment` the augmentation alone, `bench decode` our greedy decoding against `torch.nn.Transformer` and
    x-transformers.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler talks on stderr otherwise
    import torch

    from attnzoo.bench.mechanisms import TOKENS
    from attnzoo.bench.speed import compare, machine
    from attnzoo.cli.render import Column, say, say_json, say_next, table
    from attnzoo.errors import ZooError

    if model != "mechanisms" and (names or family or out or (tokens and model != "rivals")):
        raise ZooError(
            "AZ613",
            f"names, --family, --tokens and --out belong to `bench mechanisms`, not to `bench {model}`",
            help=f"attnzoo bench mechanisms {' '.join(names or ['linformer'])}",
        )
    if model == "decode":
        _decoding(threads or os.cpu_count() or 1, as_json)
        return
    if model == "rivals":
        _rivals(tuple(tokens or ()), rounds or 7, as_json)
        return
    if model in ("train", "augment"):
        _pipeline(model, threads or os.cpu_count() or 1, as_json)
        return
    if against is None and model != "mechanisms":
        raise ZooError("AZ610", f"`{model}` needs something to be held against", help="say --against MODEL")
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ZooError(
            "AZ609",
            f"there is no device `{device}` here: {str(error).splitlines()[0]}",
            help="use --device cpu",
        ) from None
    if threads:
        torch.set_num_threads(threads)
    if model == "mechanisms":
        _mechanisms(
            _named(names or [], family or [], against or "softmax"),
            {"tokens": tokens or TOKENS, "dim": dim, "heads": heads, "rounds": rounds or 7},
            where,
            out,
            as_json,
        )
        return
    assert against is not None
    rounds = rounds or 20
    candidate, baseline = _model(model), _model(against)
    if accelerate:
        from attnzoo.inference import accelerate as faster

        candidate = faster(candidate)
    sizes = [m.pretrained_cfg["input_size"] for m in (candidate, baseline)]
    if sizes[0] != sizes[1]:
        raise ZooError(
            "AZ610",
            f"`{model}` takes images of {sizes[0]}, `{against}` of {sizes[1]}",
            help="compare models that see the same",
        )
    here = machine(where)
    figures = compare(
        candidate,
        baseline,
        image=tuple(sizes[0]),
        batch=batch,
        train_batch=train_batch,
        rounds=rounds,
        device=where,
        training=not accelerate,
    )
    if as_json:
        say_json(
            {
                "model": model,
                "against": against,
                "machine": vars(here),
                "figures": [f.as_dict() for f in figures],
            }
        )
        return
    say(
        f"{model}{' (accelerated)' if accelerate else ''} against {against}: batch {batch} in eval, "
        + ("" if accelerate else f"{train_batch} in training, ")
        + f"{rounds} alternating pairs"
    )
    say(_machine(vars(here)))
    table(
        [
            Column("measured"),
            Column(model, rank=1, right=True),
            Column(against, rank=1, right=True),
            Column("ratio", right=True),
            Column("wanted", rank=2),
        ],
        [
            [f"{f.what} [{f.unit}]", _spread(f.candidate), _spread(f.baseline), f"{f.ratio:.3f}", f.better]
            for f in figures
        ],
    )
    say(
        "median (25th to 75th percentile); memory counts weights, gradients and everything in between",
        style="dim",
    )
    say_next("attnzoo compose RECIPE")


def _machine(here: dict[str, Any]) -> str:
    return (
        "{device}, {threads} threads, torch {torch}, timm {timm}; "
        "float32 matrix product {gemm:.0f} GFLOP/s, tanh {tanh:.2f} Gelem/s"
    ).format_map(here)


def _spread(values: tuple[float, float, float]) -> str:
    middle, low, high = values
    return f"{middle:.2f}" if low == high else f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _model(name: str) -> Any:
    import timm

    from attnzoo.recipe import compose
    from attnzoo.recipe.reading import is_path
    from attnzoo.zoo import load_zoo

    if timm.is_model(name):
        return timm.create_model(name)
    from attnzoo.errors import RecipeError, did_you_mean

    recipes = load_zoo().recipes
    if name not in recipes and not is_path(name):
        hint = did_you_mean(name, [*recipes, *timm.list_models("vit*"), *timm.list_models("ham*")])
        raise RecipeError(
            "AZ204",
            f"there is no model or recipe called `{name}`",
            help=hint or "`attnzoo list models` shows ours",
        )
    return compose(name)


def _named(names: list[str], families: list[str], against: str) -> list[str]:
    """The baseline, and what is held against it."""
    from attnzoo.catalogue.lists import list_mechanisms
    from attnzoo.errors import ZooError

    if not names and not families:
        raise ZooError(
            "AZ613",
            "`bench mechanisms` was not told which",
            help="attnzoo bench mechanisms linformer performer, or --family linear",
        )
    wanted = [*names, *(name for family in families for name in list_mechanisms(family=family))]
    return list(dict.fromkeys([against, *wanted]))


def _files(out: Path) -> list[Path]:
    """The CSV and the picture: where a file is named, beside each other; otherwise in that folder, which is made."""
    from attnzoo.errors import ZooError
    from attnzoo.plot import check_file

    if out.suffix[1:].isalpha() and not out.is_dir():
        files = [check_file(out).with_suffix(".csv"), out]
    else:
        files = [out / "mechanisms.csv", out / "mechanisms.png"]
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        files[0].touch()
    except OSError as error:
        raise ZooError(
            "AZ905",
            f"cannot write `{files[0]}`: {(error.strerror or str(error)).lower()}",
            help="name another folder with --out",
        ) from None
    return files


def _mechanisms(names: list[str], how: dict[str, Any], where: Any, out: Path | None, as_json: bool) -> None:
    """`bench mechanisms`."""
    from attnzoo.bench.mechanisms import Point, draw, measure, ratio, write_csv
    from attnzoo.bench.speed import machine
    from attnzoo.cli.render import Column, say, say_json, say_next, table, warn
    from attnzoo.plot import save

    here, files = machine(where), _files(out) if out else []
    found = measure(names, device=where, report=warn, **how)
    baseline = found[names[0]]
    figures: dict[str, Callable[[Point], float]] = {
        "forward": lambda p: p.forward[0],
        "step": lambda p: p.step[0],
        "memory": lambda p: p.memory,
        "step_memory": lambda p: p.step_memory,
    }
    if files:
        write_csv(found, files[0])
        save(draw(found), files[1])
    if as_json:
        mechanisms = {
            name: {
                "points": [vars(point) for point in growth.points.values()],
                "left_out": growth.left_out,
                "slopes": {what: growth.slope(of) for what, of in figures.items()},
                "faster_from": {what: growth.faster_from(baseline, of) for what, of in figures.items()},
            }
            for name, growth in found.items()
        }
        say_json({"against": names[0], "machine": vars(here), **how, "mechanisms": mechanisms})
        return
    say("one layer of {dim} channels and {heads} heads, batch 1; {rounds} alternating runs".format(**how))
    say(_machine(vars(here)))
    over = f"over {names[0]}"
    rows = [
        [
            name,
            str(n),
            *(_spread(spread) for spread in (p.forward, p.step)),
            *(
                "" if (r := ratio(p, baseline, figures[what])) is None else f"{r:.2f}"
                for what in ("forward", "step")
            ),
            f"{p.memory:.1f}",
            f"{p.step_memory:.1f}",
        ]
        for name, growth in found.items()
        for n, p in sorted(growth.points.items())
    ]
    table(
        [
            Column("mechanism", wrap=12),
            Column("tokens", right=True),
            Column("forward, ms", rank=2, right=True, wrap=8),
            Column("with backward, ms", rank=3, right=True, wrap=8),
            Column(f"forward {over}", right=True),
            Column(f"with backward {over}", rank=1, right=True),
            Column("MiB", rank=4, right=True),
            Column("MiB with backward", rank=5, right=True),
        ],
        rows,
    )
    grows = [
        [
            name,
            *(
                "" if (s := growth.slope(figures[what])) is None else f"{s:.2f}"
                for what in ("forward", "step", "step_memory")
            ),
            _from(growth.faster_from(baseline, figures["forward"])) if name != names[0] else "",
            _from(growth.faster_from(baseline, figures["step"])) if name != names[0] else "",
        ]
        for name, growth in found.items()
    ]
    say()
    say(
        "power of the number of tokens with which they grow, from 1024 tokens on; from how many they are faster"
    )
    table(
        [
            Column("mechanism", wrap=12),
            Column("forward", right=True),
            Column("with backward", rank=1, right=True),
            Column("memory", right=True),
            Column("faster from", right=True),
            Column("in training from", rank=2, right=True),
        ],
        grows,
    )
    for name, growth in found.items():
        for n, reason in growth.left_out.items():
            say(f"{name} at {n} tokens left out: {reason}", style="dim")
    if files:
        say(f"wrote {files[0]} and {files[1]}")
    say_next("attnzoo show NAME")


def _from(tokens: float | None) -> str:
    return "never" if tokens is None else f"{tokens:.0f}"


def _pipeline(what: str, threads: int, as_json: bool) -> None:
    """`bench train` and `bench augment`."""
    from attnzoo.bench import augment, training
    from attnzoo.cli.render import say, say_json, say_next

    figures = training.measure(threads=threads) if what == "train" else augment.measure(threads=threads)
    if as_json:
        say_json(figures)
        return
    if what == "train":
        say(
            f"{figures['recipe']}, batches of 256, {threads} threads, medians of {figures['rounds']} alternating epochs"
        )
        for name in ("ours", "torchvision", "bare"):
            say(f"  {name:12s} {figures[name]:8.0f} images/s")
        say(
            f"over torchvision's pipeline: {figures['over_torchvision']:.2f}   of a bare loop: {figures['of_bare']:.2f}"
        )
    else:
        say(f"{figures['n']:,} images, {threads} threads, medians of {figures['rounds']} alternating epochs")
        for name in ("batched", "pil", "tensor"):
            say(f"  {name:12s} {figures[name]:8.0f} ms")
        say(f"over torchvision, {figures['baseline']}: {figures['ratio']:.1f}")
    say_next("attnzoo train ham_b --data digits")


def _rivals(tokens: tuple[int, ...], rounds: int, as_json: bool) -> None:
    """`bench rivals`."""
    import torch

    from attnzoo.bench import rivals
    from attnzoo.bench.speed import machine
    from attnzoo.cli.render import Column, say, say_json, say_next, table, warn

    here = machine(torch.device("cpu"))
    wanted = tokens or rivals.TOKENS
    duels = rivals.measure(wanted, rounds=rounds, report=warn)
    figures: dict[str, Callable[[Any], float]] = {
        "forward": lambda p: p.forward[0],
        "step": lambda p: p.step[0],
        "step_memory": lambda p: p.step_memory,
    }
    if as_json:
        say_json(
            {
                "machine": vars(here),
                "rounds": rounds,
                "duels": [
                    {
                        "rival": duel.rival.name,
                        "ours": duel.rival.ours,
                        "tokens": duel.tokens,
                        "over": {what: duel.over(of) for what, of in figures.items()},
                        "points": [vars(point) for point in (duel.ours, duel.theirs) if point],
                    }
                    for duel in duels
                ],
            }
        )
        return
    say(f"one layer of 384 channels and 6 heads, batch 1; {rounds} alternating runs")
    say(_machine(vars(here)))
    table(
        [
            Column("mechanism", wrap=12),
            Column("beside", wrap=12),
            Column("tokens", right=True),
            Column("forward, ms", rank=1, right=True),
            Column("forward over it", right=True),
            Column("with backward over it", right=True),
            Column("memory over it", rank=2, right=True),
        ],
        [
            [
                duel.rival.ours,
                duel.rival.name,
                str(duel.tokens),
                "" if duel.ours is None else f"{duel.ours.forward[0]:.2f}",
                *("" if (r := duel.over(of)) is None else f"{r:.2f}" for of in figures.values()),
            ]
            for duel in duels
        ],
    )
    missing = dict.fromkeys(duel.rival.package for duel in duels if duel.ours is None)
    if missing:
        say(f"not installed: pip install {' '.join(missing)}")
    say_next("attnzoo bench mechanisms --family linear")


def _decoding(threads: int, as_json: bool) -> None:
    """`bench decode`."""
    from attnzoo.bench import decoding
    from attnzoo.cli.render import Column, say, say_json, say_next, table

    figures = decoding.measure(threads=threads)
    if as_json:
        say_json(figures)
        return
    say(
        "greedy, {0}+{1} layers of {dim} channels, batch {batch}, {tokens} to {tokens} tokens, "
        "vocabulary {vocabulary}; {rounds} alternating rounds".format(*figures["layers"], **figures)
    )
    say(_machine(figures["machine"]))
    rows = []
    for name, rates in figures["tokens_per_second"].items():
        over = figures["over"].get(name)
        rates = _spread(rates) if rates else f"not installed: {decoding.INSTALL}"
        rows.append([name, rates, f"{over:.2f}" if over else ""])
    table(
        [Column("decoder"), Column("tokens/s", right=True, wrap=24), Column("ours over it", right=True)], rows
    )
    say("median (25th to 75th percentile), encoder included; nobody ends a sequence early", style="dim")
    say_next("attnzoo train transformer --data reverse")

"""What a person wants to know of a composed model, and one forward and backward to prove it."""

import hashlib
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from attnzoo.bench.cost import flops
from attnzoo.core.component import NOTHING
from attnzoo.data.image_file import read_image_file
from attnzoo.errors import RecipeError
from attnzoo.hosts.dual import DualInfo
from attnzoo.hosts.given import stand_ins, taken
from attnzoo.hosts.info import POOL, BackboneInfo, HostInfo
from attnzoo.hosts.pyramid import StageInfo
from attnzoo.hosts.seq2seq import Seq2SeqInfo
from attnzoo.hosts.sequence import SequenceInfo
from attnzoo.hosts.skip import VARIANTS
from attnzoo.recipe import Composition, Plan
from attnzoo.recipe.origin import arguments, ends, second_stream, stages
from attnzoo.recipe.schema import ImageHost


@dataclass(frozen=True)
class Row:
    """A line of the table: what is put at some sites, or a branch of it.

    Args:
        sites: Names of the sites; empty for a branch.
        depth: How deep the branch is nested.
        what: The component with its options.
        level: Where a fusion's branches meet: `heads` or `tokens`; empty for a mechanism.
        provider: `plugin version`.
        heads: Number of heads.
        params: Parameters at one site.
        flops: FLOPs at one site on one sample.
        growth: How cost grows with the number of tokens n.
        masks: Kinds of mask that it honours.
    """

    sites: tuple[str, ...]
    depth: int
    what: str
    level: str
    provider: str
    heads: int
    params: int
    flops: int
    growth: str
    masks: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """A composed model in figures.

    Args:
        name: The recipe's name.
        file: Where it stands.
        sha256: Of the whole recipe as one text.
        summary: Its line.
        family: What such models are called.
        base: The plain model's name.
        takes: What goes in and how it becomes tokens, in words.
        gives: What comes out, in words.
        second: What the second stream is and its tokens, in words; empty where there is none.
        stages: What each stage looks like; empty for a model that has none.
        arguments: What the model's forward takes, with the shapes; empty for a model of sequences.
        image, grid, prefix, classes: Channels, rows and columns of the image, its patches, special tokens, classes;
            None for a model of sequences.
        depth: Number of layers.
        rows: What is put where.
        sites: How many places there are.
        heads: Of each layer, by the first word of its sites.
        skip: What layers hand on, in words; empty for nothing.
        params, base_params: Parameters of the model and of the plain one.
        flops, base_flops: Of one forward on one sample.
        starts_equal: Whether it equals the plain model before training.
        new_tensors: Tensors that the plain model has not.
        lost_tensors: Tensors that only the plain model has.
        supports, lacks: What tools can do with it.
        registers: Its name in timm.
    """

    name: str
    file: str
    sha256: str
    summary: str
    family: str
    base: str
    takes: str
    gives: str
    second: str
    stages: tuple[StageInfo, ...]
    arguments: str
    image: tuple[int, int, int] | None
    grid: tuple[int, ...] | None
    prefix: int | None
    classes: int | None
    depth: int
    rows: tuple[Row, ...]
    sites: int
    heads: dict[str, tuple[int, ...]]
    skip: str
    params: int
    base_params: int
    flops: int
    base_flops: int
    starts_equal: bool
    new_tensors: int
    lost_tensors: tuple[str, ...]
    supports: tuple[str, ...]
    lacks: tuple[str, ...]
    registers: str | None

    def as_dict(self) -> dict[str, Any]:
        """The report as data, for `--json`."""
        return asdict(self)


def describe(composition: Composition) -> Report:
    """Build the model on the meta device and read it off.

    Args:
        composition: From `attnzoo.recipe.compose_file`.
    """
    info, loaded = composition.info, composition.loaded
    with torch.device("meta"):
        model = composition.build(composition.model_cfg())
    maps = {
        name: torch.zeros(1, *info.layout.grid, dtype=torch.long if kind == "labels" else torch.float)
        for name, kind in composition.given.items()
        if isinstance(info, BackboneInfo)
    }
    inputs = {name: torch.zeros(1, *shape) for name, shape in _inputs(info).items()}
    counted = flops(model, info.sample(), maps | inputs)
    plain = flops(info.model, info.sample(), inputs)
    mine, theirs = model.state_dict(), info.model.state_dict()
    pooled = [composition.pool] if composition.pool else []
    cards = [leaf.card for plan in (*composition.plans.values(), *pooled) for leaf in plan.leaves()]
    supports, lacks = _tools(composition, any(card.fixed_length for card in cards))
    takes, gives = ends(info, bool(pooled))
    skip, host = composition.skip, loaded.recipe.host
    return Report(
        name=loaded.name,
        file=loaded.source.file,
        sha256=hashlib.sha256(loaded.text.encode()).hexdigest(),
        summary=loaded.recipe.summary,
        family=info.family,
        base=info.base,
        takes=takes,
        gives=gives,
        second=second_stream(info),
        stages=stages(info),
        arguments=arguments(info, composition.given) if isinstance(info, BackboneInfo) else "",
        image=info.image if isinstance(info, BackboneInfo) else None,
        grid=info.layout.grid if isinstance(info, BackboneInfo) else None,
        prefix=info.layout.prefix if isinstance(info, BackboneInfo) else None,
        classes=info.classes if isinstance(info, BackboneInfo) else None,
        depth=info.depth,
        rows=tuple(_rows(composition, model, counted)),
        sites=len(composition.plans) + len(pooled),
        heads=_heads(composition),
        skip=f"{skip.use}, {skip.at[0]} to {skip.at[-1]}: {VARIANTS[skip.use]}" if skip else "",
        params=sum(p.numel() for p in model.parameters()),
        base_params=info.params,
        flops=counted[""],
        base_flops=plain[""],
        starts_equal=composition.starts_equal,
        new_tensors=len(mine.keys() - theirs.keys()),
        lost_tensors=tuple(name for name in theirs if name not in mine),
        supports=supports,
        lacks=lacks,
        registers=host.registers if isinstance(host, ImageHost) else None,
    )


def _inputs(info: HostInfo) -> Mapping[str, tuple[int, ...]]:
    """Shapes, for one sample, of what the model takes by name beside images and maps."""
    return info.inputs if isinstance(info, DualInfo) else {}


def _tools(composition: Composition, fixed_length: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What works with the model, and what does not."""
    info = composition.info
    if not isinstance(info, BackboneInfo):
        cached = all(
            plan.card.incremental for name, plan in composition.plans.items() if name.startswith("decoder")
        )
        decoding = "cached decoding" if cached else "decoding, in part recomputed"
        own = ("greedy and beam search", decoding) if isinstance(info, Seq2SeqInfo) else ()
        return (*own, "torch.compile"), ("timm.create_model",)
    supports = (
        "features_only",
        "forward_intermediates",
        "checkpointing",
        "torch.compile",
        "torch.export",
        "ONNX",
    )
    lacks = ("TorchScript",)
    if info.resizes and not fixed_length:
        return (*supports, "dynamic_img_size", "set_input_size"), lacks
    return supports, (*lacks, "dynamic_img_size", "set_input_size")


def _group(site: str) -> str:
    """What the layer of a site belongs to: `blocks`, `encoder`, stream `a`, `stages.1`."""
    first, *rest = site.split(".")
    return f"{first}.{rest[0]}" if len(rest) == 2 and rest[1].isdigit() else first


def _heads(composition: Composition) -> dict[str, tuple[int, ...]]:
    """Heads of each layer, by what it belongs to; of cross-attention only where it differs."""
    heads: dict[str, tuple[int, ...]] = {}
    for name, site in composition.info.sites().items():
        group = _group(name) + (".cross" if name.endswith(".cross") else "")
        heads[group] = (*heads.get(group, ()), composition.plans[name].heads or site.heads)
    return {
        group: counts
        for group, counts in heads.items()
        if not group.endswith(".cross") or counts != heads.get(group.removesuffix(".cross"))
    }


def _rows(composition: Composition, model: nn.Module, counted: dict[str, int]) -> Iterator[Row]:
    """A line for each run of equal sites, and one for each branch below it."""
    sites, runs = composition.info.sites(), dict[tuple[str, int, int], list[str]]()
    for name, plan in composition.plans.items():
        kind = ".".join(word for word in (_group(name), name.rpartition(".")[2]) if not word.isdigit())
        runs.setdefault((kind, id(plan), plan.heads or sites[name].heads), []).append(name)
    for (_, _, heads), names in runs.items():
        path = composition.info.module_path(names[0])
        yield from _lines(
            composition.plans[names[0]], model.get_submodule(path), path, counted, heads, tuple(names), 0
        )
    pool, site = composition.pool, composition.info.pool_site()
    if pool and site:
        yield from _lines(
            pool, model.get_submodule(POOL), POOL, counted, pool.heads or site.heads, (POOL,), 0
        )


def _lines(
    plan: Plan, module: Any, path: str, counted: dict[str, int], heads: int, sites: Sequence[str], depth: int
) -> Iterator[Row]:
    options = "".join(f" {key}={value}" for key, value in plan.options.items())
    yield Row(
        sites=tuple(sites),
        depth=depth,
        what=plan.entry.name + options,
        level=("heads" if plan.inside_heads else "tokens") if plan.branches else "",
        provider=f"{plan.entry.plugin} {plan.entry.version}".strip(),
        heads=heads,
        params=sum(p.numel() for p in module.parameters()),
        flops=counted.get(path, 0),
        growth=plan.card.grows,
        masks=tuple(kind for kind in ("keys", "causal", "pairs") if kind in plan.card.masks),
    )
    if not plan.branches:
        return
    inside = getattr(module, "inner", module)  # MultiHead holds the fused heads
    where = f"{path}.inner" if inside is not module else path
    for branch, (name, child) in zip(plan.branches, inside.branches.named_children(), strict=True):
        own = (
            heads // len(plan.branches)
            if plan.entry.full_name == "attnzoo/head_split"
            else branch.heads or heads
        )
        yield from _lines(branch, child, f"{where}.branches.{name}", counted, own, (), depth + 1)


@dataclass(frozen=True)
class Exercise:
    """One forward and backward.

    Args:
        image: The image, or what else went in.
        shape: Of the output.
        forward: Seconds of a forward in eval mode, median of three.
        backward: Seconds of a forward and backward in training mode.
        tensors: Parameter tensors of the model.
        without_gradient: Those that received none, or one that is not finite.
    """

    image: str
    shape: tuple[int, ...]
    forward: float
    backward: float
    tensors: int
    without_gradient: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """As data, for `--json`."""
        return asdict(self)


def default_image() -> Path:
    """The small image that comes with attnzoo."""
    return Path(str(files("attnzoo.bench") / "lighthouse.png"))


def open_image(path: str | os.PathLike, model: nn.Module) -> Tensor:
    """An image as the model wants it, (1 3 y x).

    Args:
        path: Any image that Pillow reads.
        model: With a `pretrained_cfg`, as timm's models have.

    Raises:
        RecipeError: AZ604, when the file is no image, or the model does not take colour images.
    """
    try:
        rgb = read_image_file(path)
    except OSError as error:
        raise RecipeError(
            "AZ604",
            f"cannot open `{os.fspath(path)}`: {(error.strerror or str(error)).lower()}",
            help="name a PNG or JPEG file",
        ) from None
    config = resolve_data_config({}, model=model)
    channels, rows, columns = config["input_size"]
    if channels not in (1, 3):
        raise RecipeError("AZ604", f"the model takes images of {channels} channels; a file has 1 or 3")
    config |= {
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "input_size": (3, rows, columns),
        "mean": config["mean"][:3],
    }
    tensor = create_transform(**{k: v for k, v in config.items() if k in _TRANSFORM})(rgb)[None]
    return tensor if channels == 3 else tensor.mean(dim=1, keepdim=True)


_TRANSFORM = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


def exercise(model: nn.Module, image: str | os.PathLike) -> Exercise:
    """One forward and backward on an image; parameters and modes are left as they were.

    Args:
        model: A composed backbone. Maps that its components ask for are made of the image: its brightness in four
            steps for labels, and itself for scores; and so is a stream that the caller gives.
        image: A file.
    """
    x = open_image(image, model)
    return _exercised(model, (x,), os.fspath(image), stand_ins(x, taken(model)))


def exercise_tokens(model: nn.Module, info: HostInfo) -> Exercise:
    """One forward and backward on random tokens; parameters and modes are left as they were.

    Args:
        model: A composed model of sequences.
        info: Its host.
    """
    chance = torch.Generator().manual_seed(0)
    length = min(info.tokens, 32)
    if isinstance(info, Seq2SeqInfo):
        sizes: tuple[int, ...] = (info.form.source, info.form.target)
    else:
        assert isinstance(info, SequenceInfo)
        if not info.form.vocab:
            x = torch.randn(1, length, info.form.width, generator=chance)
            return _exercised(model, (x,), f"{length} random vectors")
        sizes = (info.form.vocab,)
    ids = tuple(torch.randint(min(4, size - 1), size, (1, length), generator=chance) for size in sizes)
    return _exercised(model, ids, " and ".join([f"{length} random tokens"] * len(ids)))


def _exercised(
    model: nn.Module, sample: tuple[Tensor, ...], what: str, maps: Mapping[str, Tensor] = NOTHING
) -> Exercise:
    was_training = model.training
    times = []
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            began = time.perf_counter()
            out = model(*sample, **maps)
            times.append(time.perf_counter() - began)
    model.train()
    began = time.perf_counter()
    twice = {name: torch.cat([t, t]) for name, t in maps.items()}
    logits = model(*(torch.cat([t, t]) for t in sample), **twice).float()
    (logits.logsumexp(dim=-1).mean() if logits.ndim == 2 else logits.square().mean()).backward()
    backward = time.perf_counter() - began
    missing = tuple(
        n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())
    )
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    tensors = sum(1 for _ in model.parameters())
    return Exercise(what, tuple(out.shape), statistics.median(times), backward, tensors, missing)

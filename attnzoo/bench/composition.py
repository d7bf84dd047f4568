"""What a person wants to know of a composed model, and one forward and backward to prove it."""

import hashlib
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from attnzoo.bench.cost import flops
from attnzoo.errors import RecipeError
from attnzoo.recipe import Composition, Plan


@dataclass(frozen=True)
class Part:
    """A line of the table: what is put at some sites, or a branch of it.

    Args:
        sites: Names of the sites; empty for a branch.
        depth: How deep the branch is nested.
        what: The part with its options.
        level: Where a fusion's branches meet: `heads` or `tokens`; empty for a mechanism.
        provider: `plugin version`.
        heads: Number of heads.
        params: Parameters at one site.
        flops: FLOPs at one site on one picture.
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
    """A composed model in figures."""

    name: str
    file: str
    sha256: str
    summary: str
    family: str
    base: str
    image: tuple[int, int, int]
    grid: tuple[int, ...]
    prefix: int
    depth: int
    classes: int
    parts: tuple[Part, ...]
    sites: int
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
    seen, loaded = composition.seen, composition.loaded
    with torch.device("meta"):
        model = composition.build(composition.model_cfg())
    counted, plain = flops(model, seen.image), flops(seen.model, seen.image)
    mine, theirs = model.state_dict(), seen.model.state_dict()
    cards = [leaf.card for plan in composition.plans.values() for leaf in plan.leaves()]
    resizes = seen.resizes and not any(card.fixed_length for card in cards)
    supports = (
        "features_only",
        "forward_intermediates",
        "checkpointing",
        "torch.compile",
        "torch.export",
        "ONNX",
    )
    return Report(
        name=loaded.name,
        file=loaded.source.file,
        sha256=hashlib.sha256(loaded.text.encode()).hexdigest(),
        summary=loaded.recipe.summary,
        family=seen.family,
        base=seen.base,
        image=seen.image,
        grid=seen.layout.grid,
        prefix=seen.layout.prefix,
        depth=seen.depth,
        classes=seen.classes,
        parts=tuple(_parts(composition, model, counted)),
        sites=len(composition.plans),
        params=sum(p.numel() for p in model.parameters()),
        base_params=seen.params,
        flops=counted[""],
        base_flops=plain[""],
        starts_equal=composition.starts_equal,
        new_tensors=len(mine.keys() - theirs.keys()),
        lost_tensors=tuple(name for name in theirs if name not in mine),
        supports=(*supports, "dynamic_img_size", "set_input_size") if resizes else supports,
        lacks=("TorchScript",) if resizes else ("TorchScript", "dynamic_img_size"),
        registers=loaded.recipe.host.registers,
    )


def _parts(composition: Composition, model: nn.Module, counted: dict[str, int]) -> Iterator[Part]:
    """A line for each run of equal sites, and one for each branch below it."""
    names = list(composition.plans)
    start = 0
    while start < len(names):
        plan = composition.plans[names[start]]
        stop = start
        while stop < len(names) and composition.plans[names[stop]] is plan:
            stop += 1
        path = f"{names[start]}.attn"
        heads = plan.heads or composition.seen.heads
        yield from _lines(plan, model.get_submodule(path), path, counted, heads, tuple(names[start:stop]), 0)
        start = stop


def _lines(
    plan: Plan, module: Any, path: str, counted: dict[str, int], heads: int, sites: Sequence[str], depth: int
) -> Iterator[Part]:
    options = "".join(f" {key}={value}" for key, value in plan.options.items())
    yield Part(
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
    inside = getattr(module, "head", module)  # MultiHead holds the fused heads
    where = f"{path}.head" if inside is not module else path
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
        image: The picture.
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


def default_picture() -> Path:
    """The small picture that comes with attnzoo."""
    return Path(str(files("attnzoo.bench") / "lighthouse.png"))


def open_picture(path: str | os.PathLike, model: nn.Module) -> Tensor:
    """A picture as the model wants it, (1 3 y x).

    Args:
        path: Any picture that Pillow reads.
        model: With a `pretrained_cfg`, as timm's models have.

    Raises:
        RecipeError: AZ604, when the file is no picture, or the model does not take colour pictures.
    """
    try:
        with Image.open(path) as picture:
            rgb = picture.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no picture that can be read"
        raise RecipeError("AZ604", f"cannot open `{os.fspath(path)}`: {reason.lower()}",
                          help="name a PNG or JPEG file") from None  # fmt: skip
    config = resolve_data_config({}, model=model)
    channels, rows, columns = config["input_size"]
    if channels not in (1, 3):
        raise RecipeError("AZ604", f"the model takes pictures of {channels} channels; a file has 1 or 3")
    config |= {
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "input_size": (3, rows, columns),
        "mean": config["mean"][:3],
    }
    tensor = create_transform(**{k: v for k, v in config.items() if k in _TRANSFORM})(rgb)[None]
    return tensor if channels == 3 else tensor.mean(dim=1, keepdim=True)


_TRANSFORM = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


def exercise(model: nn.Module, picture: str | os.PathLike) -> Exercise:
    """One forward and backward on a picture; parameters and modes are left as they were.

    Args:
        model: A composed model.
        picture: A file.
    """
    x = open_picture(picture, model)
    was_training = model.training
    times = []
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            began = time.perf_counter()
            out = model(x)
            times.append(time.perf_counter() - began)
    model.train()
    began = time.perf_counter()
    logits = model(x.repeat(2, 1, 1, 1))
    logits.float().logsumexp(
        dim=-1
    ).mean().backward() if logits.ndim == 2 else logits.float().square().mean().backward()
    backward = time.perf_counter() - began
    missing = tuple(
        n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())
    )
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    tensors = sum(1 for _ in model.parameters())
    return Exercise(
        os.fspath(picture), tuple(out.shape), statistics.median(times), backward, tensors, missing
    )

"""Maps that the caller hands over with the images, brought to the grid of the tokens."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from types import FunctionType
from typing import Any

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, fx, nn
from torch.nn import functional as F

from attnzoo.core import Component
from attnzoo.core.card import Given
from attnzoo.errors import MissingMap
from attnzoo.hosts.rollout import Rolling
from attnzoo.hosts.skip import AddNorm, PairMean

NO_MAPS: Mapping[str, Given] = {}
"""No component asks for a map."""


def without_unknown(x: Tensor, given: Mapping[str, Tensor], known: Mapping[str, Any]) -> Tensor:
    """x itself, once it is certain that every map has a component that asks for it.

    Args:
        x: Images; or, in symbolic tracing, what stands for them: then the graph looks when it runs.
        given: What the caller handed over, by name.
        known: What the components ask for, by name.

    Raises:
        TypeError: As Python does for a function without such a parameter.
    """
    if isinstance(x, fx.Proxy):
        _keep_components_whole(x.tracer)
        return x.tracer.create_proxy("call_function", without_unknown, (x, given, dict(known)), {})  # type: ignore[return-value]
    unknown = [name for name in given if name not in known]
    if unknown:
        takes = f"the maps {', '.join(known)}" if known else "no maps"
        raise TypeError(
            f"forward() got an unexpected keyword argument '{unknown[0]}'; this model takes {takes}"
        )
    return x


def _keep_components_whole(tracer: Any) -> None:
    """Let a symbolic trace call components instead of looking into them, where it could not follow everything.

    Those that hand something on to the next layer stay open: the trace has to see what goes from one to the other.
    """
    is_leaf = tracer.is_leaf_module

    def whole(module: nn.Module) -> bool:
        return isinstance(module, Component) and not any(
            isinstance(m, AddNorm | PairMean | Rolling) for m in module.modules()
        )

    tracer.is_leaf_module = lambda module, path: whole(module) or is_leaf(module, path)


def on_grid(
    given: Mapping[str, Tensor],
    name: str,
    kind: Given,
    size: int,
    image: Sequence[int],
    covered: Sequence[int],
    grid: Sequence[int],
) -> Tensor:
    """A map with one entry for each token of the grid, (b gy gx).

    Labels are those of the pixel in the middle of a token's patch; scores are their mean over it. What lies beyond the
    image, where patches pad it, repeats its edge.

    Args:
        given: What the caller handed over; or, in symbolic tracing, what stands for it.
        name: Which map.
        kind: `labels` or `scores`.
        size: Batch size.
        image: Rows and columns of the images, in pixels.
        covered: Rows and columns that the tokens stand for, in pixels.
        grid: Rows and columns of the tokens.

    Raises:
        MissingMap: AZ409, when it is missing, of another shape, or not of whole numbers where labels are wanted.
    """
    if isinstance(given, fx.Proxy):
        args = (given, name, kind, size, image, covered, grid)
        return given.tracer.create_proxy("call_function", on_grid, args, {})  # type: ignore[return-value]
    if name not in given:
        raise MissingMap(
            "AZ409",
            f"the model needs the map `{name}` ({kind}), and none was given",
            help=f"hand it over: model(images, {name}=...), one entry for each pixel or for each token of the grid",
        )
    values = given[name]
    rows, columns = grid
    if (
        values.ndim != 3
        or values.shape[0] != size
        or tuple(values.shape[1:]) not in (tuple(grid), tuple(image))
    ):
        raise MissingMap(
            "AZ409",
            f"the map `{name}` has shape {tuple(values.shape)}",
            why=f"the images are {size} of {image[0]} × {image[1]} pixels, and become {rows} × {columns} tokens",
            help=f"hand over ({size}, {image[0]}, {image[1]}) or ({size}, {rows}, {columns})",
        )
    if kind == "labels":
        if values.is_floating_point() or values.is_complex():
            raise MissingMap(
                "AZ409",
                f"the map `{name}` names regions by whole numbers; this one is of {values.dtype}",
                help=f"hand over {name}=....long()",
            )
        return values if tuple(values.shape[1:]) == tuple(grid) else _middles(values, covered, grid)
    values = values if values.is_floating_point() else values.to(torch.get_default_dtype())
    if tuple(values.shape[1:]) == tuple(grid):
        return values
    edges = [
        torch.arange(s, device=values.device).clamp(max=last - 1)
        for s, last in zip(covered, image, strict=True)
    ]
    return F.adaptive_avg_pool2d(values[:, edges[0]][:, :, edges[1]], (rows, columns))


def named(model: nn.Module, names: Iterable[str]) -> None:
    """Let the signature of a model's forward name the maps that it takes, as people and torch.export want to read it.

    Args:
        model: Its forward ends with `**given`; becomes of a class of its own, which copies and pickles as it should.
        names: Of the maps.
    """
    cls: Any = type(model)
    if names := tuple(names):
        model.__class__ = _naming(cls, names)


@cache
def _naming(cls: Any, names: tuple[str, ...]) -> Any:
    """`cls`, whose forward is the same code under a signature that names the maps."""
    forward = FunctionType(*(getattr(cls.forward, f"__{part}__") for part in _PARTS))
    forward.__doc__, forward.__qualname__ = cls.forward.__doc__, cls.forward.__qualname__
    before = inspect.signature(cls.forward)
    own = [p for p in before.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    maps = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Tensor) for name in names]
    forward.__signature__ = before.replace(parameters=[*own, *maps])  # type: ignore[attr-defined]

    def reduce(self: nn.Module) -> tuple:
        return _unpickled, (cls, names), vars(self)

    body = {"forward": forward, "__reduce__": reduce, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), body)


_PARTS = ("code", "globals", "name", "defaults", "closure")
"""What a function is made of."""


def _unpickled(cls: type, names: tuple[str, ...]) -> nn.Module:
    made = _naming(cls, names)
    return made.__new__(made)


class GivenFeatures(FeatureGetterNet):
    """timm's feature maps of a model that takes maps."""

    def forward(self, x: Tensor, **given: Tensor) -> Any:
        return self.model.forward_intermediates(  # type: ignore[operator]
            x,
            indices=self.out_indices,
            norm=self.norm,
            output_fmt=self.output_fmt,
            intermediates_only=True,
            **given,
        )


def _middles(values: Tensor, covered: Sequence[int], grid: Sequence[int]) -> Tensor:
    """The pixels in the middle of each patch, (b gy gx) of (b y x)."""
    picked = [
        ((2 * torch.arange(g, device=values.device) + 1) * s // (2 * g)).clamp(max=last - 1)
        for s, g, last in zip(covered, grid, values.shape[1:], strict=True)
    ]
    return values[:, picked[0]][:, :, picked[1]]


def handed_over(given: Mapping[str, Tensor], name: str, images: Tensor, shape: Sequence[int]) -> Tensor:
    """A whole stream that the caller handed over with the images, (b *shape).

    Args:
        given: What the caller handed over; or, in symbolic tracing, what stands for it.
        name: Which.
        images: (b c y x), for b.
        shape: Of one sample: (c y x) of a feature map, (m c) of tokens.

    Raises:
        MissingMap: AZ409, when it is missing, of another shape, or of whole numbers.
    """
    if isinstance(given, fx.Proxy):
        args = (given, name, images, tuple(shape))
        return given.tracer.create_proxy("call_function", handed_over, args, {})  # type: ignore[return-value]
    what = "tokens (b m c)" if len(shape) == 2 else "a feature map (b c y x)"
    wanted = f"({images.shape[0]}, {', '.join(map(str, shape))})"
    if name not in given:
        raise MissingMap(
            "AZ409",
            f"the model needs `{name}`, {what}, and none was given",
            help=f"hand it over: model(images, {name}=...), of shape {wanted}",
        )
    values = given[name]
    if (
        values.ndim != len(shape) + 1
        or values.shape[0] != images.shape[0]
        or values.shape[1:] != tuple(shape)
    ):
        raise MissingMap(
            "AZ409",
            f"`{name}` has shape {tuple(values.shape)}",
            why=f"the model was built for {what}",
            help=f"hand over {wanted}",
        )
    if not values.is_floating_point():
        raise MissingMap(
            "AZ409",
            f"`{name}` holds features; this is of {values.dtype}",
            help=f"hand over {name}=....float()",
        )
    return values


def taken(model: nn.Module) -> dict[str, Sequence[int] | Given]:
    """What a model takes beside images, by name, as `stand_ins` wants it."""
    return {**getattr(model, "given", {}), **getattr(model, "inputs", {})}


def stand_ins(images: Tensor, inputs: Mapping[str, Sequence[int] | Given]) -> dict[str, Tensor]:
    """What somebody could hand over with images, where nobody does, made of the images themselves.

    Args:
        images: (b c y x).
        inputs: What a model takes, by name: the shape of one sample of a stream, (c y x) of a feature map or (m c) of
            tokens, which becomes the image averaged; or the kind of a map (b y x), which becomes the brightness of each
            image, from 0 to 1 for `scores`, in four steps for `labels`.
    """
    return {name: _stand_in(images, wanted) for name, wanted in inputs.items()}


def _stand_in(images: Tensor, wanted: Sequence[int] | Given) -> Tensor:
    if isinstance(wanted, str):
        bright = images.mean(dim=1)
        low, high = bright.amin(dim=(1, 2), keepdim=True), bright.amax(dim=(1, 2), keepdim=True)
        bright = (bright - low) / (high - low).clamp(min=1e-6)
        return (4 * bright).long().clamp(max=3) if wanted == "labels" else bright
    if len(wanted) == 3:
        return F.adaptive_avg_pool3d(images, (wanted[0], wanted[1], wanted[2]))
    tokens, channels = wanted
    return F.adaptive_avg_pool1d(images.flatten(1)[:, None], tokens * channels).reshape(-1, tokens, channels)

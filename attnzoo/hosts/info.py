"""What every kind of host has in common: what is known of it before it is built, and timm's words about it."""

import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import signature
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from attnzoo.core import Card, Component, Family, Fusion, Head, Layout, Mechanism, MultiHead, Pool, Site
from attnzoo.core.card import Given
from attnzoo.errors import Place, RecipeError, UnknownArgument, did_you_mean
from attnzoo.hosts.requirements import Requirements

Put = Callable[[Site], Mechanism]
"""Builds what is put at a site."""
PutPool = Callable[[Site], Pool]
"""Builds what is put at the site `pool`."""
POOL = "pool"
"""Name of the site where one token is made of all; and what `global_pool` is called when something is put there."""


class PlainHead(Head):
    """Scaled dot-product attention, so that a model can be inspected and counted before any mechanism is chosen."""

    card = Card(
        "plain",
        Family.DOT_PRODUCT,
        "Attention as it was before any zoo.",
        masks={"keys", "pairs", "causal"},
        context=True,
        incremental=True,
    )

    def attend(self, q, k, v, *, mask, layout):
        allowed = mask.dense(q.shape[2], k.shape[2], q.device)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


def plain_attention(site: Site) -> Mechanism:
    """Attention as it was before any zoo."""
    return MultiHead(site, PlainHead(site))


@dataclass(frozen=True)
class HostInfo(ABC):
    """What a host looks like, learnt without allocating it.

    Args:
        family: What such models are called.
        base: The plain model's name.
        dim: Width of the tokens, in channels.
        depth: Number of layers.
        params: Number of parameters of the plain model.
        model: The plain model, on the meta device.
        makes: Maps that the model makes itself, so that no caller hands them over, by name.
        softmax: Whether the plain model's own attention is what `softmax` is.
    """

    family: str
    base: str
    dim: int
    depth: int
    params: int = 0
    model: nn.Module = field(default_factory=nn.Module, repr=False)
    makes: Mapping[str, Given] = field(default_factory=dict)
    softmax: bool = True

    @property
    def tokens(self) -> int:
        """How many tokens a layer sees, at most."""
        return next(iter(self.sites().values())).layout.length

    def check_memory(self, params: int) -> None:
        """Refuse a composed model that cannot be trained on one sample on this machine.

        Args:
            params: How many it has.

        Raises:
            RecipeError: AZ311.
        """
        need, most = training_bytes(params, 16 * self.depth * self.tokens * self.dim), room()
        if most and need > most:
            refuse(need, f"{params:,} parameters, {self.tokens:,} tokens")

    @abstractmethod
    def sites(self) -> dict[str, Site]:
        """The places where mechanisms are put, by name."""

    @abstractmethod
    def requirements(self, site: str) -> Requirements:
        """What a place asks of whatever is put there."""

    @abstractmethod
    def module_path(self, site: str) -> str:
        """Where in the model the mechanism of a site is."""

    @abstractmethod
    def sample(self) -> tuple[Tensor, ...]:
        """What the model takes, for one sample."""

    def filled(self, empty: frozenset[str], beside: frozenset[str]) -> "HostInfo | None":
        """The host once it is known what its sites hold; None where it cannot do without the empty ones.

        Args:
            empty: Names of the sites where nothing is put.
            beside: Names of those with something that reads a context beside its own tokens.

        Raises:
            RecipeError: AZ322, when nothing is left that reads a second stream.
        """
        return None if empty else self

    def pool_site(self, **options) -> Site | None:
        """The place where one token is made of all, with more of what is known of it; None where there is none."""
        return None

    @abstractmethod
    def skip_default(self, use: str) -> str:
        """A glob over the sites between which a skip is put when the recipe does not say."""


class _Unfilled(TorchFunctionMode):
    """Leaves tensors on the meta device unfilled: they have no values, and pretending takes most of the time there."""

    FILLS = frozenset(
        {"add_", "clamp_", "erfinv_", "fill_", "kaiming_uniform_", "mul_", "normal_", "uniform_", "zero_"}
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        filled = (args[0] if args else kwargs.get("tensor")) if func.__name__ in self.FILLS else None
        return filled if isinstance(filled, Tensor) and filled.is_meta else func(*args, **kwargs)


@contextmanager
def unallocated() -> Iterator[None]:
    """Build on the meta device, quickly, what is only looked at.

    Raises:
        RecipeError: AZ311, as soon as there are more parameters than this machine could ever hold.
    """
    mine, most, params = threading.get_ident(), 2 * room(), 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal params
        if parameter is not None and threading.get_ident() == mine:
            params += parameter.numel()
            if most and training_bytes(params) > most:  # twice, because tied weights are counted twice
                refuse(training_bytes(params) // 2, f"more than {params // 2:,} parameters")

    handle = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"), _Unfilled():
            yield
    finally:
        handle.remove()


def training_bytes(params: int, activations: int = 0) -> int:
    """A floor for the memory of one training step in float32: weights, gradients, activations.

    Args:
        params: How many.
        activations: How many numbers are kept for the backward pass.
    """
    return 4 * (2 * params + activations)


def room() -> int:
    """Four fifths of this machine's free memory, in bytes; 0 when unknown, or when ATTNZOO_FORCE says not to ask."""
    return 0 if os.environ.get("ATTNZOO_FORCE") else int(0.8 * available_memory())


def available_memory() -> int:
    """Free memory of this machine, in bytes; 0 when unknown."""
    try:
        with open("/proc/meminfo") as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)
    except OSError:
        return 0


def refuse(need: int, why: str) -> NoReturn:
    """Refuse a model that is too large for this machine.

    Args:
        need: The memory that one training step takes at least, in bytes.
        why: What takes it.

    Raises:
        RecipeError: AZ311.
    """
    raise RecipeError(
        "AZ311",
        f"one training step needs {need / 2**30:,.1f} GiB or more; this machine has {room() / 2**30:,.1f} GiB for it",
        why=why,
        help="make the model smaller; ATTNZOO_FORCE=1 tries all the same",
    )


_Info = TypeVar("_Info", bound=HostInfo)


def with_plain_model(info: _Info, build: Callable[[], nn.Module]) -> _Info:
    """Host info with the plain model and its size."""
    with unallocated():
        model = build()
    return replace(info, model=model, params=sum(p.numel() for p in model.parameters()))


@dataclass(frozen=True)
class BackboneInfo(HostInfo):
    """What a backbone for images looks like.

    Args:
        arguments: The constructor arguments that differ from the base's.
        heads: Of each block.
        layout: Prefix tokens and grid.
        image: Channels, rows and columns of the expected image, in pixels.
        classes: Number of classes.
        first: Index of the first block that has a site; the ones before have no attention.
        resizes: Whether the model can be told another size of image.
        dynamic: Whether the image's size may change from call to call.
        patch_drop: Share of patches dropped in training.
        pools: Whether its head reads one token, so that a component can make it.
        class_token: Whether the first token is the class token.
        attention: What the attention of each block is asked for, as arguments of `Site`; empty where the host tells
            when it builds.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    heads: Sequence[int] = ()
    layout: Layout = Layout((1,))
    image: tuple[int, int, int] = (3, 1, 1)
    classes: int = 0
    first: int = 0
    resizes: bool = True
    dynamic: bool = False
    patch_drop: float = 0.0
    pools: bool = True
    class_token: bool = False
    attention: Sequence[Mapping[str, Any]] = ()

    @property
    def dims(self) -> Sequence[int]:
        """Channels of what is put into each layer."""
        return (self.dim,) * self.depth

    def sites(self) -> dict[str, Site]:
        sites = (self.site(layer) for layer in range(self.first, self.depth))
        return {site.name: site for site in sites}

    def site(self, layer: int, **options) -> Site:
        """The place in block `layer`, as its mechanism will know it."""
        asked = self.attention[layer] if self.attention else {}
        return Site(
            name=f"blocks.{layer}",
            dim=self.dim,
            heads=self.heads[layer],
            layout=self.layout,
            layer=layer,
            depth=self.depth,
            **{**asked, **options},
        )

    def pool_site(self, **options) -> Site | None:
        if not self.pools:
            return None
        return replace(self.site(self.depth - 1, **options), name=POOL, rotary=False, rotation=None)

    def requirements(self, site: str) -> Requirements:
        return Requirements(
            grid=len(self.layout.grid),
            varying_length="`dynamic_img_size` lets it change" if self.dynamic else "",
            drops_tokens="`patch_drop_rate` drops some in training and shuffles the others"
            if self.patch_drop
            else "",
            rotary=site != POOL and bool(self.attention) and self.attention[0].get("rotary", False),
        )

    def module_path(self, site: str) -> str:
        return f"{site}.attn"

    def sample(self) -> tuple[Tensor, ...]:
        return (torch.zeros(1, *self.image),)

    def skip_default(self, use: str) -> str:
        return "blocks.*"


@contextmanager
def on_meta(
    base: str, builder: str, takes: Callable, hints: Mapping[str, str] = MappingProxyType({})
) -> Iterator[None]:
    """Build on the meta device; whatever a constructor raises becomes a fault of its arguments.

    Args:
        base: Name of the model.
        builder: Who builds it.
        takes: What has the arguments, to suggest one.
        hints: What to do about a complaint of the builder, by a part of its text.

    Raises:
        RecipeError: AZ309, AZ311.
        UnknownArgument: AZ309, when it is one that nothing takes.
    """
    try:
        with unallocated():
            yield
    except RecipeError:
        raise
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
        if isinstance(error, TypeError) and unknown:
            known = [name for name in signature(takes).parameters if name != "self"]
            raise UnknownArgument(
                "AZ309",
                f"`{base}` takes no argument `{unknown[1]}`",
                place=Place("<arguments>", keys=unknown[1]),  # a recipe's own are held to its schema
                help=did_you_mean(unknown[1], known)
                or f"help({takes.__module__}.{takes.__qualname__}) shows them",
            ) from None
        help = next((hint for part, hint in hints.items() if part in text), "look at `host.model`")
        raise RecipeError(
            "AZ309", f"{builder} cannot build `{base}` with these arguments: {text}", help=help
        ) from None


def without_weights(
    cfg: PretrainedCfg,
    name: str,
    arguments: Mapping[str, Any],
    mean: list[float] | None,
    std: list[float] | None,
) -> dict[str, Any]:
    """timm's configuration of a composed model: the base's, without its weights.

    Args:
        cfg: The base's.
        name: The model's own name.
        arguments: Constructor arguments that differ from the base's.
        mean: Mean of the images by channel; the base's when None.
        std: Standard deviation of the images by channel; the base's when None.
    """
    size = arguments.get("img_size", cfg.input_size[-2:])
    rows, columns = (size, size) if isinstance(size, int) else size
    channels = arguments.get("in_chans", cfg.input_size[0])
    cfg = replace(
        cfg,
        url=None,
        file=None,
        hf_hub_id=None,
        hf_hub_filename=None,
        custom_load=False,
        tag=None,
        test_input_size=None,
        min_input_size=None,
        pool_size=None,
        architecture=name,
        input_size=(channels, rows, columns),
        fixed_input_size=True,
        num_classes=arguments.get("num_classes", cfg.num_classes),
        mean=tuple(mean or cfg.mean),
        std=tuple(std or cfg.std),
    )
    return {key: value for key, value in vars(cfg).items() if value is not None}


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters that the components inside a model do not want decayed."""
    names = set()
    for path, module in model.named_modules():
        own = getattr(module, "no_weight_decay", None)
        if module is not model and callable(own):
            names |= {f"{path}.{name}" for name in own()}
    return names


@torch.no_grad()
def init_normal(model: nn.Module) -> None:
    """Weights of Linear and Conv layers, special tokens and positions from N(0, 0.02²), biases 0; mechanisms after."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name in ("cls_token", "reg_token", "pos_embed"):
        token = getattr(model, name, None)
        if isinstance(token, nn.Parameter):
            nn.init.trunc_normal_(token, std=0.02)
    init_parts(model)


def init_parts(model: nn.Module) -> None:
    """The special initialisation of components and fusions."""
    for module in reversed(list(model.modules())):  # owners after what they own
        if isinstance(module, Component | Fusion):
            module.init_weights()

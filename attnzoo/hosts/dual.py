"""Two streams of tokens in one backbone: each attends to itself, then to the other, then goes through an MLP.

Stream a is the image in patches. Stream b is what a recipe says (`streams.py`): the same image at another scale or
through convolutions, another image of the batch, learnt tokens, or what the caller hands over. Layers are pre-norm;
both cross-attentions read what their layer's self-attentions gave:

    a ← a + self_a(LN(a))          b ← b + self_b(LN(b))
    a ← a + cross_a(u, v)          b ← b + cross_b(v, u)          with u = LN(a), v = LN(b) of the line before
    a ← a + MLP(LN(a))             b ← b + MLP(LN(b))

Sites are `a.i.self`, `a.i.cross`, `b.i.self` and `b.i.cross`. What a recipe leaves out is not there: no norm, no
parameters; a layer in which stream b has no site has no MLP for it either, and b goes through as it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from keyword import iskeyword
from typing import Any

import torch
from timm.layers import Mlp, resample_abs_pos_embed
from timm.models import PretrainedCfg, checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, fx, nn

from attnzoo.core import Layout, Site
from attnzoo.core.card import Given as Kind
from attnzoo.errors import RecipeError
from attnzoo.hosts.backbone import (
    Backbone,
    base_arguments,
    build_backbone,
    check_format,
    init_linear,
    with_heads,
)
from attnzoo.hosts.given import NO_MAPS, named, without_unknown
from attnzoo.hosts.info import (
    BackboneInfo,
    Put,
    PutPool,
    init_parts,
    on_meta,
    plain_attention,
    unallocated,
    without_weights,
)
from attnzoo.hosts.requirements import Requirements
from attnzoo.hosts.streams import DualBlock, Given, Patches, Sublayers, check_patches, second_stream

default_cfgs: dict[str, Any] = {}
"""timm looks here for the configurations of the models that are registered from this module."""

BASES: dict[str, dict[str, Any]] = {
    "dual_tiny_patch4_32": {
        "img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0,
        "num_classes": 10, "b": {"stream": "scale", "patch_size": 8},
    },
    "dual_small_patch16_224": {
        "img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 6, "num_heads": 6, "mlp_ratio": 4.0,
        "num_classes": 1000, "b": {"stream": "scale", "patch_size": 32},
    },
}  # fmt: skip
"""Sizes, `dual_<width>_patch<side>_<image>`."""
_HINTS = {"needs the class token": "write `global_pool: avg`, or leave `class_token: false` out"}


class DualTransformer(Backbone):
    """A backbone with two streams of tokens.

    Under `pair`, image i of a batch reads image i - 1 while training, as self-attentions and MLPs alone have made it so
    far; nothing of that is left in eval mode, nor where an image is alone in its batch. Otherwise samples never
    influence each other.

    Args:
        img_size: Side of the image, or rows and columns.
        patch_size: Side of the patches of stream a.
        in_chans: Channels of the image.
        num_classes: 0 for features.
        global_pool: What the classifier reads of a stream: `token` for the class token, or the mean where there is
            none; `avg` for the mean without special tokens; nothing for all tokens. By `class_token` if None.
        class_token: Whether a image in patches has one.
        embed_dim: Width of the tokens of both streams, in channels.
        depth: Number of layers.
        num_heads: Heads at each site.
        mlp_ratio: Width of the MLPs, in widths of the tokens.
        qkv_bias: Whether queries, keys and values have a bias.
        init_values: What the scales of the sublayers start with; None for no scales.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the positions are added.
        proj_drop_rate: Dropout after attention and inside MLPs.
        attn_drop_rate: Dropout of attention weights.
        drop_path_rate: Share of samples that skip the last layer's sublayers in training; it grows linearly from 0.
        b: What stream b is: `stream` and its own arguments, as `second_stream` takes them.
        put: Builds what is put at a site; plain attention if None.
        left_out: Names of the sites where there is nothing.
        beside: Under `pair`, names of the sites of self-attention where the other image's tokens join the own ones.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        class_token: bool = True,
        embed_dim: int = 384,
        depth: int = 6,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        b: Mapping[str, Any] = BASES["dual_small_patch16_224"]["b"],
        put: Put = plain_attention,
        left_out: frozenset[str] = frozenset(),
        beside: frozenset[str] = frozenset(),
    ):
        super().__init__()
        rows, columns = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size, self.in_chans, self.num_classes = (rows, columns), in_chans, num_classes
        check_patches(self.img_size, patch_size, "AZ320")
        self.a = Patches(self.img_size, patch_size, in_chans, embed_dim, class_token)
        self.b = second_stream(self.img_size, in_chans, embed_dim, class_token, **b)
        layouts = {"a": self.a.layout, "b": self.a.layout if self.b is None else self.b.layout}
        self.sites = {
            site.name: replace(site, context_dim=embed_dim, context_layout=self.a.layout)
            if site.name in beside
            else site
            for site in _sites(layouts, depth, embed_dim, num_heads, attn_drop_rate, proj_drop_rate, qkv_bias)
            if site.name not in left_out and not (self.b is None and site.name.startswith("b."))
        }
        self.embed_dim = self.num_features = embed_dim
        self.reads_b = any(name.startswith("b.") for name in self.sites)
        if not self.reads_b and all(site.context_dim is None for site in self.sites.values()):
            raise RecipeError(
                "AZ322",
                "nothing reads stream b",
                why="its sites and the sites a.*.cross are all empty",
                help="put something at a.*.cross, or choose a host with one stream",
            )

        def component(name: str) -> nn.Module | None:
            return put(self.sites[name]) if name in self.sites else None

        def sublayers(stream: str, layer: int) -> Sublayers:
            attn, cross = component(f"{stream}.{layer}.self"), component(f"{stream}.{layer}.cross")
            thinks = stream == "a" or attn is not None or cross is not None
            return Sublayers(
                layouts[stream],
                embed_dim,
                attn,
                cross,
                any(f"{one}.{layer}.cross" in self.sites for one in "ab"),
                Mlp(embed_dim, int(embed_dim * mlp_ratio), drop=proj_drop_rate) if thinks else None,
                init_values,
                drop_path_rate * layer / max(depth - 1, 1),
            )

        self.blocks = nn.ModuleList(
            DualBlock(sublayers("a", i), None if self.b is None else sublayers("b", i)) for i in range(depth)
        )
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(depth)
        ]
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.norm: nn.Module = nn.LayerNorm(embed_dim)
        self.norm_b: nn.Module = nn.LayerNorm(embed_dim) if self.reads_b else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool: str = global_pool or ("token" if class_token else "avg")
        self.inputs = {self.b.name: self.b.shape} if isinstance(self.b, Given) else {}
        for name in self.inputs:
            _check_name(name)
        named(self, self.inputs)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Linear layers, tokens and positions from a truncated N(0, 0.02²); convolutions of a stem after He."""
        init_linear(self)
        for stream in (self.a, self.b):
            if stream is not None:
                stream.init_weights()
        init_parts(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to which layer, for learning rates by layer."""
        return {"stem": r"^[ab]\.", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another number of classes.

        Args:
            num_classes: 0 for features.
            global_pool: `token`, `avg`, or the empty string for all tokens; as before if None.
        """
        if global_pool not in (None, "", "avg", "token"):
            raise ValueError(
                f"tokens are pooled by `token` or `avg`, or not at all, but not by `{global_pool}`"
            )
        if global_pool == "token" and not self.a.layout.prefix:
            raise ValueError("`global_pool: token` needs the class token")
        like = next(self.parameters())
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        self.head_hidden_size = self.embed_dim * (2 if self.reads_b and self.global_pool else 1)
        self.head = nn.Linear(self.head_hidden_size, num_classes).to(like) if num_classes else nn.Identity()
        self.head.train(self.training)

    def embed(self, x: Tensor, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Both streams before the first layer, (b n c) and (b m c); None for one that is not there.

        Args:
            x: Images (b c y x).
            given: What the caller handed over with them, by name.

        Raises:
            MissingMap: AZ409, when it is missing or does not fit.
            TypeError: When there is something that nobody asks for.
        """
        x = without_unknown(x, given, self.inputs)
        a = self.pos_drop(self.a(x, given))
        if self.b is not None:
            return a, self.pos_drop(self.b(x, given))
        # symbolic tracing knows no sizes: a graph pairs
        alone = not isinstance(x, fx.Proxy) and x.shape[0] == 1
        return a, a.roll(1, 0) if self.training and not alone else None

    def layer(self, block: nn.Module, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Both streams after a block."""
        return checkpoint(block, a, b) if self.grad_checkpointing else block(a, b)

    def both(self, a: Tensor, b: Tensor | None) -> Tensor:
        """What the classifier reads: the normalised tokens of a, then those of b if it reads them, (b n+m c)."""
        return torch.cat([self.norm(a), self.norm_b(b)], dim=1) if self.reads_b else self.norm(a)

    def forward_features(self, x: Tensor, **given: Tensor) -> Tensor:
        """Normalised tokens of both streams, a's first, (b n+m c); a's alone where the classifier reads them alone.

        Args:
            x: Images (b c y x).
            given: Stream b by the name that the recipe gives it, where it is the caller's.
        """
        return self.encode(x, given)

    def encode(self, x: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """`forward_features` of images (b c y x) with what the caller handed over, by name."""
        a, b = self.embed(x, given)
        for block in self.blocks:
            a, b = self.layer(block, a, b)
        return self.both(a, b)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of tokens, or what stands for the streams itself, (b 2c).

        Args:
            x: From `forward_features`.
            pre_logits: Whether the classifier is left out.
        """
        if self.global_pool:
            n = self.a.layout.length
            parts = [(x[:, :n], self.a.layout)]
            if self.reads_b:
                assert self.b is not None
                parts.append((x[:, n:], self.b.layout))
            x = torch.cat([self._pooled(tokens, layout) for tokens, layout in parts], dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def _pooled(self, tokens: Tensor, layout: Layout) -> Tensor:
        """The class token, or the mean of the others, (b c)."""
        if self.global_pool == "token" and layout.prefix:
            return tokens[:, 0]
        return tokens[:, layout.prefix :].mean(dim=1)

    def forward(self, x: Tensor, **given: Tensor) -> Tensor:
        """Logits, or features; arguments as for `forward_features`."""
        return self.forward_head(self.encode(x, given))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **given: Tensor,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """What `forward_features` gives, and what stream a is on the way.

        Args:
            x: Images (b c y x).
            indices: After which layers; the last n when a number, all when None.
            norm: Whether the final norm is applied to what is on the way.
            stop_early: Whether layers after the last of them are left out.
            output_fmt: `NCHW` for maps (b c y x), `NLC` for tokens (b n c), both without special tokens.
            intermediates_only: Whether only what is on the way is returned.
            given: As for `forward_features`.
        """
        check_format(output_fmt)
        wanted, last = feature_take_indices(len(self.blocks), indices)
        (a, b), inner = self.embed(x, given), []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            a, b = self.layer(block, a, b)
            if i in wanted:
                inner.append(self.a.layout.split(self.norm(a) if norm else a)[1])
        if output_fmt == "NCHW":
            inner = [self.a.layout.to_grid(tokens) for tokens in inner]
        return inner if intermediates_only else (self.both(a, b), inner)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what these intermediates do not need.

        Args:
            indices: After which layers stream a is wanted.
            prune_norm: Whether the final norms go too.
            prune_head: Whether pooling and the classifier go too; then nothing reads stream b at the end.

        Returns:
            The layers that are wanted, counted from 0.
        """
        wanted, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head or prune_norm:
            self.norm_b = nn.Identity()
        if prune_head:
            self.reads_b = False
            self.reset_classifier(0, "")
        return wanted


def _check_name(name: str) -> None:
    """Refuse a name for what the caller hands over that no argument of `forward` can have.

    Raises:
        RecipeError: AZ322.
    """
    methods = (
        getattr(DualTransformer, f"forward{part}") for part in ("", "_features", "_intermediates", "_head")
    )
    if iskeyword(name) or any(name in signature(method).parameters for method in methods):
        raise RecipeError(
            "AZ322",
            f"what is handed over as stream b cannot be called `{name}`",
            why="it becomes an argument of the model's forward, where that word has a meaning already",
            help="choose another `name`",
        )


def _sites(
    layouts: Mapping[str, Layout],
    depth: int,
    dim: int,
    heads: int,
    attn_drop: float,
    proj_drop: float,
    qkv_bias: bool,
) -> Iterator[Site]:
    """All sites of both streams, layer by layer."""
    for layer in range(depth):
        for own, other in ("ab", "ba"):
            site = Site(
                name=f"{own}.{layer}.self",
                dim=dim,
                heads=heads,
                layout=layouts[own],
                layer=layer,
                depth=depth,
                attn_drop=attn_drop,
                proj_drop=proj_drop,
                qkv_bias=qkv_bias,
            )
            yield site
            yield replace(site, name=f"{own}.{layer}.cross", context_dim=dim, context_layout=layouts[other])


def checkpoint_filter_fn(state: dict[str, Tensor], model: DualTransformer) -> dict[str, Tensor]:
    """A state dict whose positions fit the model's grids."""
    fitted = dict(state)
    for key, stream in (("a.pos_embed", model.a), ("b.pos_embed", model.b)):
        positions = state.get(key)
        if positions is None or stream is None or positions.shape == stream.pos_embed.shape:
            continue
        if len(stream.layout.grid) == 2:
            grid = list(stream.layout.grid)
            fitted[key] = resample_abs_pos_embed(positions, grid, num_prefix_tokens=stream.layout.prefix)
    return fitted


@dataclass(frozen=True)
class DualInfo(BackboneInfo):
    """What is known of a backbone with two streams before it is built.

    Args:
        left_out: Names of the sites where there is nothing.
        beside: Names of the sites of self-attention where the tokens of another image join the own ones.
        second: What stream b is, in words.
        inputs: Shapes, for one sample, of what `forward` takes by name beside the image.
    """

    left_out: frozenset[str] = frozenset()
    beside: frozenset[str] = frozenset()
    second: str = ""
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def sites(self) -> dict[str, Site]:
        return {name: replace(site, heads=self.heads[site.layer]) for name, site in self.model.sites.items()}  # type: ignore[union-attr,operator]

    def site(self, layer: int, **options) -> Site:
        return replace(self.sites()[f"a.{layer}.self"], **options)

    def requirements(self, site: str) -> Requirements:
        place = self.sites()[site]
        return Requirements(
            context=site.endswith(".cross"),
            context_grid=len(place.context_layout.grid) if place.context_layout else 1,
            may_join=site in self.beside,
            grid=len(place.layout.grid),
            no_maps="a model of kind dual hands none on to its sites",
        )

    def module_path(self, site: str) -> str:
        stream, layer, kind = site.split(".")
        return f"blocks.{layer}.{stream}.{'attn' if kind == 'self' else 'cross'}"

    def filled(self, empty: frozenset[str], beside: frozenset[str]) -> "DualInfo":
        pairs = self.model.b is None
        beside = frozenset(name for name in beside if pairs and name.endswith(".self"))
        if not empty and not beside:
            return self
        with unallocated():
            model = DualTransformer(
                **{**BASES[self.base], **self.arguments}, left_out=empty, beside=beside, put=_plain
            )
        params = sum(p.numel() for p in model.parameters())
        return replace(self, model=model, left_out=empty, beside=beside, params=params)


def _plain(site: Site) -> Any:
    """Attention as it was before any zoo; to its own tokens alone where others may join them."""
    return plain_attention(site if site.name.endswith(".cross") else replace(site, context_dim=None))


def host_info(base: str, arguments: Mapping[str, Any]) -> DualInfo:
    """Build the base on the meta device and look at it.

    Args:
        base: Key of `BASES`.
        arguments: Constructor arguments that differ from the base's.

    Raises:
        RecipeError: AZ301 no such base, AZ309 the arguments do not fit, AZ320 patches that do not tile the image,
            AZ322 no such second stream of this image.
    """
    wanted = base_arguments(BASES, base, "backbone with two streams", arguments)
    with on_meta(base, "attnzoo", DualTransformer, _HINTS):
        model = DualTransformer(**wanted)
    return DualInfo(
        family="dual",
        base=base,
        arguments=arguments,
        dim=model.embed_dim,
        heads=(next(iter(model.sites.values())).heads,) * len(model.blocks),
        depth=len(model.blocks),
        layout=model.a.layout,
        image=(model.in_chans, *model.img_size),
        classes=model.num_classes,
        params=sum(p.numel() for p in model.parameters()),
        model=model,
        resizes=False,
        pools=False,
        second=_second(model),
        inputs=model.inputs,
    )


def _second(model: DualTransformer) -> str:
    """Stream b in words, with its tokens."""
    stream = model.b or model.a
    grid, prefix = " × ".join(map(str, stream.layout.grid)), stream.layout.prefix
    tokens = f"{grid}{f' + {prefix}' if prefix else ''} tokens"
    words = "another image of the batch, in training only" if model.b is None else stream.words
    return f"{words} → {tokens}" if words else f"{tokens}, learnt"


def build(
    info: BackboneInfo,
    put: Put,
    *,
    pool: PutPool | None = None,
    given: Mapping[str, Kind] = NO_MAPS,
    **how: Any,
) -> nn.Module:
    """The base with mechanisms at its sites; arguments as for `kinds.ImageHost.build`."""
    assert isinstance(info, DualInfo)
    return build_backbone(
        partial(DualTransformer, put=with_heads(info, put), left_out=info.left_out, beside=info.beside),
        {**BASES[info.base], **info.arguments},
        info,
        filter_fn=checkpoint_filter_fn,
        named_inputs=bool(info.inputs),
        **how,
    )


def model_cfg(
    name: str, base: str, arguments: Mapping[str, Any], mean: list[float] | None, std: list[float] | None
) -> dict[str, Any]:
    """timm's configuration of a composed model, with the statistics of ImageNet when none are said."""
    side = BASES[base]["img_size"]
    cfg = PretrainedCfg(
        input_size=(3, side, side),
        num_classes=BASES[base]["num_classes"],
        interpolation="bicubic",
        crop_pct=1.0,
        first_conv="a.patch_embed.proj",
        classifier="head",
    )
    return without_weights(cfg, name, arguments, mean, std)

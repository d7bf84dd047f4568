"""One stack of layers over one sequence: tokens or vectors in, a guess for every position out, or one for the whole.

Sites are `layers.i`, and `pool` for a component that makes one token of all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from attnzoo.core import Layout, Mask, Pool, Site
from attnzoo.hosts.info import POOL, HostInfo, Put, PutPool, plain_attention, undecayed, with_plain_model
from attnzoo.hosts.layers import Body, Layer, init_xavier
from attnzoo.hosts.positions import check_length, positions
from attnzoo.hosts.requirements import Requirements
from attnzoo.hosts.skip import Skip, carried, install


@dataclass(frozen=True)
class Form:
    """What a recipe says of the model.

    Args:
        dim: Width of the tokens, in channels.
        mlp_dim: Hidden width of the MLPs; 0 for layers without.
        layers: How many.
        vocab: Size of the vocabulary, when tokens come in; 0 when vectors do.
        width: Channels of the vectors that come in; 0 when tokens do.
        outputs: Classes, or channels of what goes out.
        max_length: Longest sequence.
        positions: `sinusoidal`, `learned`, `rotary` or `none`.
        causal: Whether a position sees only itself and what came before.
        norm_first: Whether norms stand before sublayers.
        act: Activation of the MLPs.
        dropout: A probability.
        bias: Whether Linear layers have biases.
    """

    dim: int = 64
    mlp_dim: int = 256
    layers: int = 2
    vocab: int = 0
    width: int = 0
    outputs: int = 1
    max_length: int = 64
    positions: str = "learned"
    causal: bool = True
    norm_first: bool = True
    act: str = "gelu"
    dropout: float = 0.0
    bias: bool = True

    @property
    def body(self) -> Body:
        """What all layers share."""
        return Body(self.dim, self.mlp_dim, self.act, self.dropout, nn.LayerNorm, self.norm_first, self.bias)


class SequenceModel(nn.Module):
    """A guess for every position of a sequence, or with a pool one for the whole.

    Args:
        form: What a recipe says.
        sites: By name.
        put: Builds what is put at a site.
        skip: What layers hand on.
        pool: Makes one token of all; None for a guess for every position.
    """

    def __init__(self, form: Form, sites: Mapping[str, Site], put: Put, skip: Skip, pool: Pool | None = None):
        super().__init__()
        body = form.body
        self.max_length, self.causal = form.max_length, form.causal
        self.embed = nn.Embedding(form.vocab, form.dim) if form.vocab else nn.Linear(form.width, form.dim)
        self.positions = positions(form.positions, form.max_length, form.dim)
        self.drop = nn.Dropout(form.dropout)
        self.layers = nn.ModuleList(Layer(body, put(sites[f"layers.{i}"])) for i in range(form.layers))
        self.norm = body.norm(form.dim) if form.norm_first else nn.Identity()
        self.pool = pool
        self.head = nn.Linear(form.dim, form.outputs, bias=form.bias)
        if skip:
            layers: list[Any] = [self.get_submodule(name) for name in skip.at]
            install(skip, [layer.attn for layer in layers], layers, form.dim, body.norm)
        init_xavier(self)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters, beyond 1-D ones, that an optimiser must not decay."""
        return undecayed(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits or values (b n o), or (b o) with a pool.

        Args:
            x: Ids (b n), or vectors (b n e).

        Raises:
            LayoutMismatch: AZ407, when the sequence is too long.
        """
        n = x.shape[1]
        check_length(n, self.max_length)
        x = self.drop(self.positions(self.embed(x)))
        mask, layout, handed = Mask(causal=self.causal), Layout((n,)), None
        for layer in self.layers:
            x, handed = carried(layer, handed, x, mask, layout)
        x = self.norm(x)
        return self.head(x if self.pool is None else self.pool(x, layout=layout))


@dataclass(frozen=True)
class SequenceInfo(HostInfo):
    """What is known of a stack before it is built.

    Args:
        form: What a recipe says.
        heads: Of each layer.
    """

    form: Form = field(default_factory=Form)
    heads: Sequence[int] = ()

    def sites(self) -> dict[str, Site]:
        sites = (self.site(layer) for layer in range(self.form.layers))
        return {site.name: site for site in sites}

    def site(self, layer: int, **options) -> Site:
        """The place in a layer, as its mechanism will know it."""
        form = self.form
        return Site(
            name=f"layers.{layer}",
            dim=form.dim,
            heads=self.heads[layer],
            layout=Layout((form.max_length,)),
            layer=layer,
            depth=form.layers,
            attn_drop=form.dropout,
            proj_drop=form.dropout,
            qkv_bias=form.bias,
            proj_bias=form.bias,
            rotary=form.positions == "rotary",
            **options,
        )

    def pool_site(self, **options) -> Site | None:
        return replace(self.site(self.form.layers - 1, **options), name=POOL, rotary=False)

    def requirements(self, site: str) -> Requirements:
        causal = self.form.causal
        own = Requirements(
            masks=frozenset({"causal"} if causal else ()),
            varying_length="sequences may differ in length" if causal else "",
            rotary=self.form.positions == "rotary",
            no_maps="a model of kind sequence takes a sequence alone",
        )
        return replace(own, masks=frozenset(), rotary=False) if site == POOL else own

    def module_path(self, site: str) -> str:
        return f"{site}.attn"

    def sample(self) -> tuple[Tensor, ...]:
        form = self.form
        if form.vocab:
            return (torch.zeros(1, form.max_length, dtype=torch.long),)
        return (torch.zeros(1, form.max_length, form.width),)

    def skip_default(self, use: str) -> str:
        return "layers.*"


def host_info(form: Form, heads: Sequence[int]) -> SequenceInfo:
    """What a model of this form is, learnt without allocating it.

    Args:
        form: What a recipe says.
        heads: Of each layer.

    Raises:
        RecipeError: AZ308, when heads do not divide the width.
    """
    info = SequenceInfo(
        family="transformer",
        base=f"{form.layers} layers",
        dim=form.dim,
        depth=form.layers,
        form=form,
        heads=heads,
    )
    return with_plain_model(info, lambda: build(info, plain_attention))


def build(
    info: SequenceInfo,
    put: Put,
    skip: Skip = Skip(),  # noqa: B008 - frozen
    pool: PutPool | None = None,
) -> SequenceModel:
    """The model with mechanisms at its sites.

    Args:
        info: From `host_info`.
        put: Builds what is put at a site.
        skip: What layers hand on.
        pool: Builds what is put at the site `pool`; None for a guess for every position.
    """
    made = pool(cast(Site, info.pool_site())) if pool else None
    return SequenceModel(info.form, info.sites(), put, skip, made)

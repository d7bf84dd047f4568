"""An encoder and a decoder for pairs of sequences.

Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, §3, with the norm before each sublayer unless said
otherwise. Sites are `encoder.i`, `decoder.i.self` and `decoder.i.cross`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnzoo.core import KVCache, Layout, Mask, Site
from attnzoo.hosts.info import HostInfo, Put, plain_attention, undecayed, with_plain_model
from attnzoo.hosts.layers import NORMS, Body, Layer, init_xavier
from attnzoo.hosts.positions import check_length, positions
from attnzoo.hosts.requirements import Requirements
from attnzoo.hosts.skip import Skip, carried, install

PAD, BOS, EOS = range(3)
"""Ids of padding, beginning and end, in every vocabulary."""


class Memory(NamedTuple):
    """What the encoder made.

    Args:
        tokens: (b n c).
        keys: Which of them are no padding, (b n).
    """

    tokens: Tensor
    keys: Tensor


@dataclass
class State:
    """A decoding that is under way.

    Args:
        memory: What the encoder made.
        caches: For each layer what self- and cross-attention kept.
        length: Tokens so far.
    """

    memory: Memory
    caches: list[tuple[KVCache, KVCache]]
    length: int = 0

    def select(self, rows: Tensor, same_sources: bool = False) -> None:
        """Go on with these rows, in this order; a row may be named again.

        Args:
            rows: Indices, (b,).
            same_sources: Whether each row is replaced by one with the same source, as among the beams of a sentence.
        """
        if not same_sources:
            self.memory = Memory(*(t.index_select(0, rows) for t in self.memory))
        for own, cross in self.caches:
            own.select(rows)
            cross.select(rows, kept=not same_sources)


@dataclass(frozen=True)
class Form:
    """What a recipe says of the model.

    Args:
        dim: Width of the tokens, in channels.
        mlp_dim: Hidden width of the MLPs.
        encoder, decoder: Number of layers.
        source, target: Sizes of the vocabularies.
        max_length: Longest sequence, in tokens.
        positions: `sinusoidal`, `learned`, `rotary` or `none`.
        tie: `none`; `target`: the output layer's matrix is the target's embedding; `all`: both sides have that one.
        norm: `layer` or `scalar`.
        norm_first: Whether norms stand before sublayers.
        act: Activation of the MLPs.
        dropout: A probability.
        bias: Whether Linear layers have biases.
        scale_embedding: Whether embeddings are multiplied by √c.
    """

    dim: int = 512
    mlp_dim: int = 2048
    encoder: int = 6
    decoder: int = 6
    source: int = 8000
    target: int = 8000
    max_length: int = 350
    positions: str = "sinusoidal"
    tie: str = "none"
    norm: str = "layer"
    norm_first: bool = True
    act: str = "relu"
    dropout: float = 0.1
    bias: bool = True
    scale_embedding: bool = True

    @property
    def body(self) -> Body:
        """What all layers share."""
        return Body(
            self.dim, self.mlp_dim, self.act, self.dropout, NORMS[self.norm], self.norm_first, self.bias
        )


class Seq2Seq(nn.Module):
    """Logits of the next target tokens, given a source.

    Args:
        form: What a recipe says.
        sites: By name.
        put: Builds what is put at a site.
        skip: What layers hand on.
    """

    pad, bos, eos = PAD, BOS, EOS

    def __init__(self, form: Form, sites: Mapping[str, Site], put: Put, skip: Skip):
        super().__init__()
        body = form.body
        self.dim, self.max_length = form.dim, form.max_length
        self.scale = form.dim**0.5 if form.scale_embedding else 1.0
        self.embed_source = nn.Embedding(form.source, form.dim)
        self.embed_target = self.embed_source if form.tie == "all" else nn.Embedding(form.target, form.dim)
        self.positions = positions(form.positions, form.max_length, form.dim)
        self.drop = nn.Dropout(form.dropout)
        self.encoder = nn.ModuleList(Layer(body, put(sites[f"encoder.{i}"])) for i in range(form.encoder))
        self.decoder = nn.ModuleList(
            Layer(body, put(sites[f"decoder.{i}.self"]), put(sites[f"decoder.{i}.cross"]))
            for i in range(form.decoder)
        )
        self.encoder_norm = body.norm(form.dim) if form.norm_first else nn.Identity()
        self.decoder_norm = body.norm(form.dim) if form.norm_first else nn.Identity()
        self.head = nn.Linear(form.dim, form.target, bias=form.bias)
        if form.tie != "none":
            self.head.weight = self.embed_target.weight
        if skip:
            components = [self.get_submodule(module_path(name)) for name in skip.at]
            layers: list[Any] = [self.get_submodule(".".join(name.split(".")[:2])) for name in skip.at]
            install(skip, components, layers, form.dim, body.norm)  # type: ignore[arg-type]
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Glorot's initialisation; a tied output layer keeps the embedding's."""
        init_xavier(self)
        if self.head.weight is self.embed_target.weight:
            nn.init.normal_(self.head.weight, std=self.dim**-0.5)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters, beyond 1-D ones, that an optimiser must not decay."""
        return undecayed(self)

    def embed(self, embedding: nn.Embedding, ids: Tensor, first: int = 0) -> Tensor:
        """Tokens with their positions, (b n c).

        Args:
            embedding: Of the side.
            ids: (b n).
            first: Position of the first.

        Raises:
            LayoutMismatch: AZ407, when the sequence is too long.
        """
        check_length(first + ids.shape[1], self.max_length)
        return self.drop(self.positions(embedding(ids) * self.scale, first))

    def encode(self, source: Tensor) -> Memory:
        """Read a source.

        Args:
            source: Ids (b n), padded with 0.
        """
        keys, x = source != PAD, self.embed(self.embed_source, source)
        mask, layout, handed = Mask(keys=keys), Layout((source.shape[1],)), None
        for layer in self.encoder:
            x, handed = carried(layer, handed, x, mask, layout)
        return Memory(self.encoder_norm(x), keys)

    def decode(self, target: Tensor, memory: Memory) -> Tensor:
        """Logits (b m v) of the token after each of the target.

        Args:
            target: Ids (b m), padded with 0.
            memory: What the encoder made.
        """
        x = self.embed(self.embed_target, target)
        mask, layout = Mask(keys=target != PAD, causal=True), Layout((target.shape[1],))
        context = memory.tokens, Mask(keys=memory.keys), Layout((memory.tokens.shape[1],))
        handed = None
        for layer in self.decoder:
            x, handed = carried(layer, handed, x, mask, layout, *context)
        return self.head(self.decoder_norm(x))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (b m v) of the token after each of the target.

        Args:
            source: Ids (b n), padded with 0.
            target: Ids (b m), padded with 0.
        """
        return self.decode(target, self.encode(source))

    def start(self, memory: Memory) -> State:
        """A decoding before its first token."""
        return State(memory, [(KVCache(), KVCache()) for _ in self.decoder])

    def step(self, tokens: Tensor, state: State) -> Tensor:
        """Logits (b k v) of the token after each of the newest; the state goes on. None of them is padding.

        Args:
            tokens: Ids of the newest (b k).
            state: Is changed.
        """
        x = self.embed(self.embed_target, tokens, state.length)
        state.length += tokens.shape[1]
        mask, layout, memory = Mask(causal=True), Layout((state.length,)), state.memory
        context_mask = Mask() if bool(memory.keys.all()) else Mask(keys=memory.keys)
        context = memory.tokens, context_mask, Layout((memory.tokens.shape[1],))
        handed = None
        for layer, caches in zip(self.decoder, state.caches, strict=True):
            x, handed = carried(layer, handed, x, mask, layout, *context, caches)
        return self.head(self.decoder_norm(x))


def module_path(site: str) -> str:
    """Where in the model the mechanism of a site is."""
    return site.replace(".self", ".attn") if site.endswith((".self", ".cross")) else f"{site}.attn"


@dataclass(frozen=True)
class Seq2SeqInfo(HostInfo):
    """What is known of an encoder and decoder before it is built.

    Args:
        form: What a recipe says.
        encoder_heads, decoder_heads: Of each layer.
        plain: The model with plain attention, on the meta device.
    """

    form: Form = field(default_factory=Form)
    encoder_heads: Sequence[int] = ()
    decoder_heads: Sequence[int] = ()

    def sites(self) -> dict[str, Site]:
        encoder = [self._site(f"encoder.{i}", i, h) for i, h in enumerate(self.encoder_heads)]
        decoder = [
            self._site(f"decoder.{i}.{kind}", i, h, cross=kind == "cross")
            for i, h in enumerate(self.decoder_heads)
            for kind in ("self", "cross")
        ]
        return {site.name: site for site in (*encoder, *decoder)}

    def _site(self, name: str, layer: int, heads: int, cross: bool = False) -> Site:
        form = self.form
        return Site(
            name=name,
            dim=form.dim,
            heads=heads,
            layout=Layout((form.max_length,)),
            layer=layer,
            depth=form.encoder if name.startswith("encoder") else form.decoder,
            context_dim=form.dim if cross else None,
            context_layout=Layout((form.max_length,)) if cross else None,
            attn_drop=form.dropout,
            proj_drop=form.dropout,
            qkv_bias=form.bias,
            proj_bias=form.bias,
            rotary=form.positions == "rotary" and not cross,
            norm=NORMS[form.norm],
        )

    def requirements(self, site: str) -> Requirements:
        own = Requirements(
            masks=frozenset({"keys"}),
            varying_length="sentences differ in length",
            open_end="padding follows a sentence, and tokens to come the ones so far",
            rotary=self.form.positions == "rotary",
            no_maps="a model of kind seq2seq takes a source and a target alone",
        )
        if site.endswith(".cross"):
            return replace(own, context=True, rotary=False)
        if site.endswith(".self"):
            return replace(own, masks=frozenset({"keys", "causal"}))
        return own

    def module_path(self, site: str) -> str:
        return module_path(site)

    def sample(self) -> tuple[Tensor, ...]:
        length = self.form.max_length
        return torch.zeros(1, length, dtype=torch.long), torch.zeros(1, length, dtype=torch.long)

    def skip_default(self, use: str) -> str:
        return "decoder.*.cross" if use == "cross" else "encoder.*"


def host_info(form: Form, encoder_heads: Sequence[int], decoder_heads: Sequence[int]) -> Seq2SeqInfo:
    """What a model of this form is, learnt without allocating it.

    Args:
        form: What a recipe says.
        encoder_heads, decoder_heads: Of each layer.

    Raises:
        RecipeError: AZ308, when heads do not divide the width.
    """
    info = Seq2SeqInfo(
        family="transformer",
        base=f"{form.encoder}+{form.decoder} layers",
        dim=form.dim,
        depth=form.encoder + form.decoder,
        form=form,
        encoder_heads=encoder_heads,
        decoder_heads=decoder_heads,
    )
    return with_plain_model(info, lambda: build(info, plain_attention))


def build(info: Seq2SeqInfo, put: Put, skip: Skip = Skip()) -> Seq2Seq:  # noqa: B008 - frozen
    """The model with mechanisms at its sites.

    Args:
        info: From `host_info`.
        put: Builds what is put at a site.
        skip: What layers hand on.
    """
    return Seq2Seq(info.form, info.sites(), put, skip)

"""The sites of models of sequences, as their hosts make them."""

from collections.abc import Sequence
from dataclasses import replace

from attnzoo.core import Layout, Site
from attnzoo.hosts.layers import NORMS
from attnzoo.hosts.seq2seq import Form as PairForm
from attnzoo.hosts.sequence import Form


def layers_of(form: Form, heads: Sequence[int]) -> dict[str, Site]:
    """The sites of a stack by name: `layers.i`.

    Args:
        form: Of the model.
        heads: Of each layer.
    """
    return {f"layers.{i}": layer_site(form, i, heads[i]) for i in range(form.layers)}


def layer_site(form: Form, layer: int, heads: int) -> Site:
    """The site in a layer of a stack."""
    return Site(
        name=f"layers.{layer}",
        dim=form.dim,
        heads=heads,
        layout=Layout((form.max_length,)),
        layer=layer,
        depth=form.layers,
        attn_drop=form.dropout,
        proj_drop=form.dropout,
        qkv_bias=form.bias,
        proj_bias=form.bias,
        rotary=form.positions == "rotary",
    )


def pool_site(form: Form, heads: int) -> Site:
    """Where one token is made of all."""
    return replace(layer_site(form, form.layers - 1, heads), name="pool", rotary=False)


def sides_of(form: PairForm, encoder: Sequence[int], decoder: Sequence[int]) -> dict[str, Site]:
    """The sites of an encoder and a decoder by name: `encoder.i`, `decoder.i.self`, `decoder.i.cross`.

    Args:
        form: Of the model.
        encoder: Heads of each layer of the encoder.
        decoder: Heads of each layer of the decoder.
    """
    sites = {f"encoder.{i}": side_site(form, f"encoder.{i}", i, heads) for i, heads in enumerate(encoder)}
    for i, heads in enumerate(decoder):
        for kind in ("self", "cross"):
            sites[f"decoder.{i}.{kind}"] = side_site(form, f"decoder.{i}.{kind}", i, heads)
    return sites


def side_site(form: PairForm, name: str, layer: int, heads: int) -> Site:
    """A site of an encoder or a decoder."""
    cross = name.endswith(".cross")
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

"""Claims about decoding token by token: `step` gives the last rows of `forward`, whatever happened to the cache."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.core import KVCache, Layout, Mask, Mechanism
from attnzoo.testing.checks.fusions import fused_tokens
from attnzoo.testing.claim import claim, requires, same
from attnzoo.testing.influence import random_mask
from attnzoo.testing.strategies import Checkable, Scene


def _decodes(card: Any) -> bool:
    """Whether a sequence can be continued: causal, of any length, on a line."""
    line = card.grid in (None, "any", 1) and card.context_grid is None
    return "causal" in card.masks and line and not card.fixed_length and not card.given


def _line(scene: Scene, length: int | None = None) -> Scene:
    """The scene as a sequence without special tokens, in which `step` has something to remember."""
    return scene.alone().with_layout((length or max(3, scene.layout.length),), prefix=0)


def _steps(
    component: Mechanism, x: Tensor, sizes: list[int], cache: KVCache, keys: Tensor | None = None
) -> Tensor:
    """What `step` gives for pieces of these sizes, one after the other."""
    rows, done = [], cache.length
    for piece in x.split(sizes, dim=1):
        done += piece.shape[1]
        mask = Mask(causal=True, keys=None if keys is None else keys[:, :done])
        rows.append(component.step(piece, cache, mask=mask, layout=Layout((done,))))
    return torch.cat(rows, dim=1)


def _rows(component: Mechanism, x: Tensor, sizes: list[int], keys: Tensor | None = None) -> Tensor:
    """What `forward` gives for the newest tokens, given all so far."""
    rows, done = [], x.shape[1] - sum(sizes)
    for size in sizes:
        done += size
        mask = Mask(causal=True, keys=None if keys is None else keys[:, :done])
        rows.append(component(x[:, :done], mask=mask, layout=Layout((done,)))[:, -size:])
    return torch.cat(rows, dim=1)


@requires("mechanism", where=_decodes, share=0.2)
def check_incremental(cls: Checkable, scene: Scene) -> None:
    """Token by token `step` gives the newest rows of `forward`, with padding too; `incremental`: of the full pass."""
    scene = _line(scene)
    component, x = scene.build(), scene.inputs()[0]
    one = [1] * x.shape[1]
    for keys in (None, random_mask(scene, {"keys"}).keys) if "keys" in scene.card.masks else (None,):
        out = _steps(component, x, one, KVCache(), keys)
        same(out, _rows(component, x, one, keys), "token by token, `step` gives the newest row of `forward`")
        if scene.card.incremental:
            full = scene.run(component, [x], Mask(causal=True, keys=keys))
            same(out, full, "incremental, so token by token `step` gives the rows of the full pass")


@requires("mechanism", where=_decodes, share=0.4)
def check_step_in_pieces(cls: Checkable, scene: Scene) -> None:
    """In pieces of several tokens `step` gives the newest rows of `forward`; a prompt at once, then tokens, too."""
    scene = _line(scene, 7)
    component, x = scene.build(), scene.inputs()[0]
    for sizes in ([1, 3, 2, 1], [4, 1, 1, 1], [7]):
        out = _steps(component, x, sizes, KVCache())
        same(
            out,
            _rows(component, x, sizes),
            f"in pieces of {sizes} tokens `step` gives the newest rows of `forward`",
        )


@requires("mechanism", where=_decodes, share=0.1)
def check_long_decoding(cls: Checkable, scene: Scene) -> None:
    """After 50 and more steps `step` still gives the newest row of `forward`."""
    scene = _line(replace(scene, batch=1), 70)
    component, x = scene.build(), scene.inputs()[0]
    with torch.no_grad():
        out = _steps(component, x, [1] * 70, KVCache())[:, -20:]
        same(
            out,
            _rows(component, x, [1] * 20),
            "after 50 and more steps `step` gives the newest row of `forward`",
        )


@requires("mechanism", where=_decodes, share=0.4)
def check_cache_selected(cls: Checkable, scene: Scene) -> None:
    """After `KVCache.select` has reordered and doubled samples, `step` goes on as if they had always been so."""
    scene = _line(replace(scene, batch=max(2, scene.batch)), 6)
    component, x, cache = scene.build(), scene.inputs()[0], KVCache()
    rows = torch.tensor([1, 1, 0])
    _steps(component, x[:, :4], [3, 1], cache)
    cache.select(rows)
    more = scene.inputs(2)[0][rows, :2]
    expected = _rows(component, torch.cat([x[rows, :4], more], dim=1), [1, 1])
    same(_steps(component, more, [1, 1], cache), expected, "after `select` samples go on as themselves")


@requires("mechanism", where=_decodes, share=0.2)
def check_caches_apart(cls: Checkable, scene: Scene) -> None:
    """Two batches in turn, with a cache each, are decoded as if each were alone, and `forward` between them too."""
    scene = _line(scene, 5)
    component, both, caches = scene.build(), [scene.inputs()[0], scene.inputs(2)[0]], [KVCache(), KVCache()]
    outs: list[list[Tensor]] = [[], []]
    for i in range(5):
        for rows, x, cache in zip(outs, both, caches, strict=True):
            rows.append(_steps(component, x[:, i : i + 1], [1], cache))
        scene.run(component, scene.inputs(4), Mask(causal=True))
    for rows, x in zip(outs, both, strict=True):
        claimed = "what is kept of a sequence is kept in its cache alone"
        same(torch.cat(rows, dim=1), _rows(component, x, [1] * 5), claimed)


@requires(
    "mechanism",
    context=True,
    where=lambda card: card.context_grid is None and not card.fixed_length,
    share=0.4,
)
def check_step_with_context(cls: Checkable, scene: Scene) -> None:
    """Reading from a context, token by token, gives what the full pass gives where that looks at single tokens."""
    scene = replace(_line(scene, 4), batch=max(2, scene.batch)).across()
    component, (x, context) = scene.build(), scene.inputs()
    keys = random_mask(scene, {"keys"}).keys if "keys" in scene.card.masks else None
    rows, cache = [], KVCache()
    for i in range(4):
        piece = x[:, i : i + 1]
        site = replace(scene.site, layout=Layout((i + 1,)))
        expected = replace(scene, site=site).run(component, [x[:, : i + 1], context], Mask(keys=keys))[:, -1:]
        out = component.step(
            piece,
            cache,
            context,
            mask=Mask(keys=keys),
            layout=Layout((i + 1,)),
            context_layout=scene.site.context_layout,
        )
        same(out, expected, f"with a context, step {i + 1} gives the last row of `forward`")
        rows.append(out)
    order = torch.arange(scene.batch).flip(0)
    cache.select(order)
    out = component.step(
        x[order, :1],
        cache,
        context[order],
        mask=Mask(keys=None if keys is None else keys[order]),
        layout=Layout((5,)),
        context_layout=scene.site.context_layout,
    )
    tokens = torch.cat([x, x[:, :1]], dim=1)[order]
    site = replace(scene.site, layout=Layout((5,)))
    mask = Mask(keys=None if keys is None else keys[order])
    expected = replace(scene, site=site).run(component, [tokens, context[order]], mask)[:, -1:]
    same(out, expected, "after `select`, with a context, samples go on as themselves")


@requires("fusion", mask="causal", share=0.4)
def check_fused_decoding(cls: Checkable, scene: Scene) -> None:
    """With branches that decode token by token the fusion does, too."""
    scene = replace(scene, inside=False).with_layout((5,), prefix=0)
    fused, x = fused_tokens(scene), scene.random(scene.batch, 5, scene.site.dim, stream=1)
    full = fused(x, mask=Mask(causal=True), layout=scene.layout)
    claim(
        tuple(full.shape) == tuple(x.shape), "fused mechanisms give tokens", f"they give {tuple(full.shape)}"
    )
    same(
        _steps(fused, x, [1, 3, 1], KVCache()), full, "a fusion of what decodes step by step decodes so, too"
    )

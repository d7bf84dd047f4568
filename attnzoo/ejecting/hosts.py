"""The function that builds a model, for each kind of host."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from attnzoo.core import Layout
from attnzoo.ejecting import vit
from attnzoo.ejecting.construction import function
from attnzoo.ejecting.expressions import call, literal, ref
from attnzoo.ejecting.modules import Symbol
from attnzoo.errors import ZooError
from attnzoo.hosts.vision_transformer import ZooResPostBlock, ZooVisionTransformer, timm_arguments
from attnzoo.recipe import Composition

CHANGED = [
    "",
    "Args:",
    "    changed: Arguments of the model that shall be others: `num_classes=10`, `drop_path_rate=0.1`.",
]
TIMM = Symbol("timm")


def vision_transformer(name: str, composition: Composition) -> list[str]:
    """Of timm's ViT: timm builds it, with blocks of the file's."""
    assert composition.image is not None
    host, info = composition.image
    arguments = dict(timm_arguments(info.base, info.arguments))
    if composition.skip or composition.pool or composition.given or info.dynamic or info.patch_drop:
        raise ZooError("AZ974", "not yet")
    block = ref(vit.SitedBlock)
    body = [
        f"block = {ref(partial)}({block}, put, LAYOUT, {info.depth})",
        f"arguments: dict[str, {ref(Symbol('typing', 'Any'))}] = ⟪{literal(arguments)}⟫",
        f'return {ref(TIMM)}.create_model("{info.base}", block_fn=block, **(arguments | changed))',
    ]
    layout = f'LAYOUT = {literal(Layout(info.layout.grid, info.layout.prefix))}\n"""How the tokens of an image are arranged."""'
    return [layout, function(name, ["The model, with weights as before training.", *CHANGED], body)]

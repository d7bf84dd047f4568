"""Claims about geometry: layouts, lengths, and maps that lie on the grid."""

from dataclasses import replace

import torch

from attnzoo.core import Layout
from attnzoo.testing.claim import claim, refused, requires, same
from attnzoo.testing.strategies import Checkable, Scene


def _needs(card: object) -> bool:
    return card.grid is not None  # type: ignore[attr-defined]


@requires("mechanism", "pool", where=_needs, share=0.4)
def check_wrong_layout_refused(cls: Checkable, scene: Scene) -> None:
    """A component that needs geometry refuses tokens that do not fit the layout, with AZ401."""
    first, *rest = scene.layout.grid
    wrong = [
        Layout((first + 1, *rest), scene.layout.prefix),
        Layout(scene.layout.grid, scene.layout.prefix + 1),
    ]
    if isinstance(scene.card.grid, int):
        wrong.append(Layout((*scene.layout.grid, 1), scene.layout.prefix))
    ways = scene.ways()[: 1 if scene.site.context_dim is not None else None]  # keys lie as the context does
    for layout in wrong:
        site = replace(scene.site, layout=layout)
        claimed = f"a layout of {layout} for {scene.layout.length} tokens and grid: {scene.card.grid}"
        for way in ways:
            refused("AZ401", claimed, way, replace(scene, site=site))


@requires("mechanism", "pool", where=lambda card: card.grid is None, share=0.4)
def check_geometry_ignored(cls: Checkable, scene: Scene) -> None:
    """A component that needs no geometry gives the same output however the grid is arranged."""
    component, inputs = scene.build(), scene.inputs()
    line = scene.line().layout
    expected = scene.run(component, inputs)
    for layout in (line, Layout((1, *line.grid), line.prefix), Layout((*line.grid, 1), line.prefix)):
        arranged = replace(scene, site=replace(scene.site, layout=layout))
        same(
            arranged.run(component, inputs),
            expected,
            "grid: None, so the arrangement of the grid has no say",
        )


@requires("mechanism", "pool", where=lambda card: card.fixed_length)
def check_wrong_length_refused(cls: Checkable, scene: Scene) -> None:
    """`fixed_length`: more tokens than it was built for are refused with AZ408 (`most`: AZ403), and fewer, or not."""
    component, exact = scene.build(), scene.card.fixed_length is True
    first, *rest = scene.layout.grid
    longer = scene.with_layout((first + 3, *rest))
    if longer.reads > scene.reads:
        claimed = f"{longer.reads} tokens at a site for {scene.reads}"
        refused("AZ408" if exact else "AZ403", claimed, longer.run, component, longer.inputs())
    if first == 1:
        return
    shorter = scene.with_layout((first - 1, *rest))
    if shorter.reads >= scene.reads:
        return
    if exact:
        claimed = f"{shorter.reads} tokens at a site for {scene.reads}"
        refused("AZ408", claimed, shorter.run, component, shorter.inputs())
    else:
        out = shorter.run(component, shorter.inputs())
        claim(
            tuple(out.shape) == shorter.shape(component),
            "fixed_length: most, so it reads fewer",
            "it does not",
        )


@requires("mechanism", "pool", where=lambda card: card.given)
def check_maps_needed(cls: Checkable, scene: Scene) -> None:
    """A map that the card names is refused with AZ409 when it is missing or does not lie on the grid."""
    ways, given = scene.ways(), scene.given
    for name, kind in scene.card.given.items():
        without = {other: m for other, m in given.items() if other != name} | {"another": given[name]}
        claimed = f"a call without the map `{name}` ({kind})"
        for way in ways:
            refused("AZ409", claimed, way, scene, given=without)
        whole = given[name]
        for wrong in (whole[:, :-1], whole.unsqueeze(1), whole.repeat(2, *[1] * (whole.ndim - 1))):
            claimed = f"the map `{name}` of shape {tuple(wrong.shape)} for a grid of {scene.layout.grid}"
            for way in ways:
                refused("AZ409", claimed, way, scene, given=given | {name: wrong})


@requires("mechanism", "pool", where=lambda card: card.given)
def check_maps_count(cls: Checkable, scene: Scene) -> None:
    """Every map that the card names has influence, in each sample on that sample alone; other maps have none."""
    scene = scene.crowded().roomy()
    component, inputs, given = scene.build(), scene.inputs(), scene.given
    expected = scene.run(component, inputs)
    more = scene.run(component, inputs, given=given | {"another": torch.zeros(1)})
    same(more, expected, "maps that the card does not name have no influence", 0)
    for name, kind in scene.card.given.items():
        for sample in range(scene.batch):
            grid, moves = given[name][sample].flatten(), False
            claimed = f"the map `{name}` of sample {sample}"
            # which tokens have the largest scores may be the same from behind, but not the other way round
            for moved in (torch.arange(len(grid)),) if kind == "labels" else (grid.flip(0) + 1, 1 - grid):
                other = given[name].clone()
                other[sample] = moved.reshape(other[sample].shape).to(other.dtype)
                out = scene.run(component, inputs, given=given | {name: other})
                moves |= not torch.allclose(out[sample], expected[sample], rtol=0, atol=1e-9)
                rest = [i for i in range(scene.batch) if i != sample]
                same(out[rest], expected[rest], f"{claimed} has influence on no other")
            claim(moves, f"{claimed} has influence on that sample", "it has none")


@requires("mechanism", "pool", where=lambda card: "labels" in card.given.values(), share=0.4)
def check_labels_are_names(cls: Checkable, scene: Scene) -> None:
    """Labels are names: other numbers for the same regions, in any order, change nothing."""
    component, inputs, given = scene.build(), scene.inputs(), scene.given
    expected = scene.run(component, inputs)
    for rename in (lambda m: 7 - 3 * m, lambda m: m + 1000, lambda m: m.to(torch.int32)):
        kinds = scene.card.given
        other = {name: rename(m) if kinds[name] == "labels" else m for name, m in given.items()}
        same(
            scene.run(component, inputs, given=other), expected, "labels are names: which numbers has no say"
        )

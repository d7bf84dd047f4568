"""One forward of what plugins put at a site, before any model is built."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from attnzoo.core import Layout, Mask, Pool, Site
from attnzoo.errors import RecipeError, ZooError
from attnzoo.hosts.requirements import Requirements
from attnzoo.recipe.plan import Plan, blamed, plugin_fault
from attnzoo.zoo.blame import OURS, blame, short
from attnzoo.zoo.contract import Breach, initialised, watching

SHORT = 16
"""Tokens of a trial where their number may vary."""
LARGEST = 1 << 24
"""The most numbers, in weights and one n × m map for each head, of a trial that computes."""


def try_out(plan: Plan, site: Site, required: Requirements) -> None:
    """Run what is put at a site on the meta device, which costs next to nothing, and hold it to the site's shape.

    What looks at numbers cannot run there. It is run with random numbers; not at all where a model is so large that
    this would be felt: then its first forward tells. Built-in components are not tried, their checks are, unless they
    need a context on a grid: whether one grid goes with another only they know.

    Args:
        plan: What is put there.
        site: The site.
        required: What it asks of a mechanism.

    Raises:
        RecipeError: AZ013 a component raises, AZ014 it gives back something else; AZ401 grids that do not go together.
    """
    parts = [part for part in (*plan.leaves(), *plan.fusions()) if part.entry.plugin != OURS]
    if not parts:
        for leaf in plan.leaves():
            if leaf.card.context_grid is not None and site.context_layout is not None:
                with blamed(leaf.entry, leaf.place):
                    _run(leaf, site, required, [], "meta")
        return
    if required.varying_length and not plan.card.fixed_length and len(site.layout.grid) == 1:
        site = replace(site, layout=Layout((min(site.layout.grid[0], SHORT),), site.layout.prefix))
    try:
        try:
            _run(plan, site, required, parts, "meta")
        except ZooError:  # of shapes and masks the meta device knows all
            raise
        except Exception:
            if _size(plan, site) <= LARGEST:
                with torch.random.fork_rng(devices=[]):
                    _run(plan, site, required, parts, "cpu")
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _fault(error, parts) from error


def _fault(error: BaseException, parts: Sequence[Plan]) -> RecipeError:
    """What went wrong in a trial, at the place of the component."""
    found = blame(error, [part.entry for part in parts])
    part = next((part for part in parts if found and part.entry is found.entry), parts[0])
    if isinstance(error, ZooError):
        return RecipeError.of([d if d.place else replace(d, place=part.place) for d in error.diagnostics])
    if isinstance(error, Breach):
        return plugin_fault(error, part.entry, part.place, error.code, error.reason)
    return plugin_fault(error, part.entry, part.place, "AZ013", f"failed with {short(error)}")


def _size(plan: Plan, site: Site) -> int:
    with torch.device("meta"):
        weights = sum(p.numel() for p in plan.build(site).parameters())
    return weights + (plan.heads or site.heads) * site.layout.length**2


def _run(plan: Plan, site: Site, required: Requirements, parts: Sequence[Plan], device: str) -> None:
    """Initialise and run in both modes, as a model would."""
    entries, places = [part.entry for part in parts], {part.entry.full_name: part.place for part in parts}
    there = site.context_layout or site.layout
    n, m = site.layout.length, there.length
    if site.context_dim is not None and not plan.card.fixed_length and plan.card.grid is None:
        n = max(1, n - 1)
    with torch.device(device):
        mechanism = plan.build(site)
        initialised(mechanism, entries)
        x = torch.randn(2, n, site.dim)
        context = None if site.context_dim is None else torch.randn(2, m, site.context_dim)
        keys = torch.ones(2, m, dtype=torch.bool) if "keys" in required.masks else None
        mask = Mask(keys, causal="causal" in required.masks)
        whole = (2, *site.layout.grid)
        given = {
            name: torch.zeros(whole, dtype=torch.long) if kind == "labels" else torch.rand(whole)
            for name, kind in plan.card.given.items()
        }
        where = {} if context is None else {"context_layout": there}
        inputs = (x,) if isinstance(mechanism, Pool) else (x, context)
        with watching(mechanism, entries, places), torch.no_grad():
            for training in (False, True):
                mechanism.train(training)(*inputs, mask=mask, layout=site.layout, given=given, **where)

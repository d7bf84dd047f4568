"""A model in a few lines: which recipe, what is put where, how many parameters, what goes in."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from attnzoo.alone.modules import Alone
from attnzoo.alone.multihead import MultiheadAttention
from attnzoo.catalogue.text import Sheet, Table
from attnzoo.core import Fused, FusedHeads, Head, Mechanism, MultiHead, Pool
from attnzoo.errors import RecipeError


@dataclass(frozen=True)
class _Found:
    """A component in a model.

    Args:
        site: Where it is.
        formula: What it is.
        params: How many parameters it has.
    """

    site: str
    formula: str
    params: int

    @property
    def kind(self) -> tuple[str, ...]:
        """The site's name without its numbers: sites of a kind go on one line."""
        return tuple(word for word in self.site.split(".") if not word.isdigit())


def describe(model: nn.Module) -> Sheet:
    """A model's composition in a few lines, beside PyTorch's long form.

        attnzoo.describe(timm.create_model("ham_vit_b"))

    Args:
        model: From `compose`, `timm.create_model`, `create` or `as_mha`, or any network with such modules in it.

    Raises:
        RecipeError: AZ112, for what is no model.
    """
    if not isinstance(model, nn.Module):
        raise RecipeError(
            "AZ112",
            f"a model is described, not a {type(model).__name__}",
            help="attnzoo.show(name) shows what has a name",
        )
    model = _unwrapped(model)
    origins = {
        path: vars(module)["_origin"] for path, module in model.named_modules() if "_origin" in vars(module)
    }
    found = list(_components(model, "", "" if "" in origins else None))
    total = _spaced(sum(p.numel() for p in model.parameters()))
    names = dict.fromkeys(origin.recipe for origin in origins.values())
    formulas = dict.fromkeys(one.formula for one in found)
    what = " + ".join(names) if names else next(iter(formulas)) if len(formulas) == 1 else ""
    kind = type(model).__name__
    title = f"{what}: {kind}, {total} parameters" if what else f"{kind}, {total} parameters"
    takes = [f"takes {_takes(model.get_submodule(path), origin.takes)}" for path, origin in origins.items()]
    takes += [f"stream b: {origin.second}" for origin in origins.values() if origin.second]
    if isinstance(model, Alone | MultiheadAttention):
        takes.append(f"takes {model.takes}")
    if not found:
        return Sheet(title, (*takes, "no mechanism of the zoo is in it"))
    rows = [
        [_range(run), run[0].formula, f"{_spaced(run[0].params)} parameters{' each' * (len(run) > 1)}"]
        for run in _runs(found)
    ]
    return Sheet(title, (*takes, Table(rows)))


def _unwrapped(model: nn.Module) -> nn.Module:
    """What torch.compile and data parallelism have inside."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _components(module: nn.Module, path: str, host: str | None) -> Iterator[_Found]:
    """The outermost components, in the order of the model.

    Args:
        module: Where to look.
        path: Its name in the model.
        host: Path of the composed model that it is in; None outside of any.
    """
    if "_origin" in vars(module):
        host = path
    if isinstance(module, Mechanism | Pool | Head):
        placed = vars(module).get("_placed")
        site = path or "attn"
        if placed is not None and host is not None:
            site = ".".join(filter(None, (host, placed.site)))
        yield _Found(
            site, placed.formula if placed else _formula(module), sum(p.numel() for p in module.parameters())
        )
        return
    for name, child in module.named_children():
        yield from _components(child, f"{path}.{name}" if path else name, host)


def _formula(component: nn.Module) -> str:
    """A component that was built by hand, as far as its structure tells."""
    if isinstance(component, MultiHead):
        return _formula(component.inner)
    if isinstance(component, Fused | FusedHeads):
        branches = ", ".join(map(_formula, component.branches.values()))
        return f"{component.fusion.card.name}({branches})"
    return component.card.name  # type: ignore[union-attr,return-value]


def _runs(found: list[_Found]) -> list[list[_Found]]:
    """Equal components at sites of a kind that follow each other."""
    runs: list[list[_Found]] = []
    for one in found:
        last = next((run for run in reversed(runs) if run[0].kind == one.kind), None)
        if last and (last[0].formula, last[0].params) == (one.formula, one.params):
            last.append(one)
        else:
            runs.append([one])
    return runs


def _range(run: list[_Found]) -> str:
    first, last = run[0].site, run[-1].site
    return first if len(run) == 1 else f"{first} … {last} ({len(run)})"


def _takes(model: nn.Module, said: str) -> str:
    """What a composed model takes; of a backbone the image as it is now, for timm can change its size.

    Args:
        model: The composed model.
        said: What it took when it was composed.
    """
    inner = getattr(model, "model", model)  # features_only wraps it
    embed = getattr(inner, "patch_embed", None) or getattr(inner, "tokenizer", None)
    size, channels = getattr(embed, "img_size", None), getattr(inner, "in_chans", None)
    image = f"{channels} × {size[0]} × {size[1]} image" if size and channels else ""
    return said if said.startswith(image) else image


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")

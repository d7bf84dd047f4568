"""The models of all recipes, made known to timm."""

from collections.abc import Callable, Mapping
from typing import Any

from timm.models import generate_default_cfgs, is_model, register_model
from torch import nn

from attnzoo.errors import RecipeError, ZooError
from attnzoo.hosts.kinds import HOSTS
from attnzoo.recipe.compose import build
from attnzoo.recipe.load import Loaded, is_text, load
from attnzoo.recipe.resolve import anonymous
from attnzoo.recipe.schema import ImageHost
from attnzoo.zoo import Problem, load_zoo

registered: dict[str, str] = {}
"""The models that are known to timm through us: model name to recipe name."""


def register_models() -> None:
    """Register every recipe of the zoo that says `registers:`. A recipe that cannot be is noted, not raised."""
    zoo = load_zoo()
    for kind in HOSTS:
        if anonymous(kind) not in registered:
            registered[anonymous(kind)] = ""
            register_model(_entry_point(anonymous(kind), kind, None))
    for name, entry in zoo.recipes.items():
        try:
            loaded = load(str(entry.value))
            host = loaded.recipe.host
            model = host.registers if isinstance(host, ImageHost) else None
            if model is None or registered.get(model) == name:
                continue
            if is_model(model):
                raise RecipeError("AZ305", f"timm already has a model called `{model}`")
            _register(model, loaded)
            registered[model] = name
        except ZooError as error:
            first = error.diagnostics[0]
            zoo.problems.append(
                Problem(entry.plugin, first.code, f"recipe `{name}`: {first.message}", str(error), False)
            )


def _register(name: str, loaded: Loaded) -> None:
    host = loaded.recipe.host
    assert isinstance(host, ImageHost)
    arguments = host.model.model_dump(exclude_unset=True, exclude_none=True)
    cfg = HOSTS[host.kind].model_cfg(name, host.base, arguments, host.mean, host.std)
    HOSTS[host.kind].default_cfgs.update(generate_default_cfgs({name: cfg}))
    register_model(_entry_point(name, host.kind, loaded))


def _entry_point(name: str, kind: str, loaded: Loaded | None) -> Callable[..., nn.Module]:
    """The function timm calls for a model name."""

    def entry_point(
        pretrained: bool = False, *, recipe: str | Mapping[str, Any] | None = None, **arguments: Any
    ) -> nn.Module:
        cfg = arguments.pop("pretrained_cfg", None)
        if recipe is None and loaded is None:
            raise RecipeError(
                "AZ111", f"`{name}` needs `recipe=`", help="hand the name or the text of a recipe"
            )
        if isinstance(recipe, str) and not is_text(recipe):
            # a name of the zoo: a saved configuration never makes us open files
            load_zoo().recipes.find(recipe)
        source = loaded if recipe is None else load(recipe)
        assert source is not None
        return build(
            source, arguments, pretrained=pretrained, pretrained_cfg=cfg if isinstance(cfg, dict) else None
        )

    summary = loaded.recipe.summary if loaded else "A composed model; its recipe is an argument."
    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = HOSTS[kind].__name__
    entry_point.__doc__ = summary
    return entry_point

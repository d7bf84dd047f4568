"""The models of all recipes, made known to timm."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import timm.models
from timm.models import (
    PretrainedCfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    model_entrypoint,
    register_model,
)
from timm.models._registry import _deprecated_models
from torch import nn

from attnzoo.errors import RecipeError, ZooError
from attnzoo.hosts.kinds import HOSTS
from attnzoo.recipe.composing import build
from attnzoo.recipe.loading import load
from attnzoo.recipe.made_with import read_made_with, warn_of_others
from attnzoo.recipe.reading import Loaded, is_text
from attnzoo.recipe.resolving import anonymous, registered
from attnzoo.recipe.schema import ImageHost
from attnzoo.zoo import Problem, Provider, Zoo, load_zoo
from attnzoo.zoo.blame import OURS, details, short


def register_models() -> None:
    """Register every recipe of the zoo that says `registers:`. A recipe that cannot be is noted, not raised."""
    zoo = load_zoo()
    _give_back(zoo)
    for kind in HOSTS:
        if anonymous(kind) not in registered:
            registered[anonymous(kind)] = ""
            register_model(_entry_point(anonymous(kind), kind, None))
            # They cannot be built bare, so they stand in no list: timm's lists leave out what is deprecated.
            _deprecated_models[anonymous(kind)] = None
    for name, entry in sorted(zoo.recipes.items(), key=lambda item: item[1].plugin != OURS):  # ours first
        try:
            loaded = load(str(entry.value))
            host = loaded.recipe.host
            model = host.registers if isinstance(host, ImageHost) else None
            if model is None or registered.get(model) == name:
                continue
            owner = _owner(zoo, model) if is_model(model) else None
            if owner is not None and owner.name != entry.plugin:
                text = f"it registered a model as `{model}`, which is the recipe `{entry.full_name}`'s"
                zoo.problems.append(Problem(owner.name, "AZ015", text, fatal=False))
            elif is_model(model):
                raise RecipeError("AZ305", f"timm already has a model called `{model}`")
            _register(model, loaded)
            registered[model] = name
        except Exception as error:  # whatever one recipe is made of, the others are registered
            if isinstance(error, ZooError):
                code, text, more = error.code, error.diagnostics[0].message, str(error)
            else:
                code, text, more = "AZ013", short(error), details(error)
            zoo.problems.append(Problem(entry.plugin, code, f"recipe `{name}`: {text}", more, False))


def _owner(zoo: Zoo, model: str) -> Provider | None:
    """The plugin whose code registered a model itself, if it was one."""
    package = model_entrypoint(model).__module__.partition(".")[0]
    return next((one for one in zoo.providers if one.name != OURS and one.package == package), None)


def _give_back(zoo: Zoo) -> None:
    """Names of timm's own models that a plugin took are timm's again."""
    if not any(provider.works for provider in zoo.providers if provider.name != OURS):
        return
    for model in timm.models.list_models():
        own, owner = getattr(timm.models, model, None), _owner(zoo, model)
        if own is not None and owner is not None and own.__module__.startswith("timm."):
            _known_to_timm(own)
            text = f"it registered a model as `{model}`, which is timm's; timm's own was put back"
            zoo.problems.append(Problem(owner.name, "AZ015", text, fatal=False))


def _known_to_timm(entry_point: Callable[..., nn.Module]) -> None:
    """Register an entry point, whoever has its name."""
    with warnings.catch_warnings(action="ignore"):  # timm warns of names that change hands
        register_model(entry_point)


def _register(name: str, loaded: Loaded) -> None:
    host = loaded.recipe.host
    assert isinstance(host, ImageHost)
    cfg = HOSTS[host.kind].model_cfg(name, host.base, host.arguments, host.mean, host.std)
    HOSTS[host.kind].default_cfgs.update(generate_default_cfgs({name: cfg}))
    _known_to_timm(_entry_point(name, host.kind, loaded))


def _entry_point(name: str, kind: str, loaded: Loaded | None) -> Callable[..., nn.Module]:
    """The function timm calls for a model name."""

    def entry_point(
        pretrained: bool = False,
        *,
        recipe: str | Mapping[str, Any] | None = None,
        made_with: Mapping[str, Any] | None = None,
        pretrained_cfg: str | PretrainedCfg | Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> nn.Module:
        cfg = pretrained_cfg
        if recipe is None and loaded is None:
            raise RecipeError(
                "AZ111", f"`{name}` needs `recipe=`", help="hand the name or the text of a recipe"
            )
        if isinstance(recipe, str) and not is_text(recipe):
            # a name of the zoo: a saved configuration never makes us open files
            if recipe.endswith((".yaml", ".yml")) or "/" in recipe or "\\" in recipe:
                raise RecipeError(
                    "AZ204",
                    f"`{recipe[:200]}` is a path; a model takes a recipe's name or its text",
                    why="arguments are saved with weights, and nobody else has this file",
                    help=f'hand the text: recipe="$(cat {recipe[:200]})" in a shell, Path(...).read_text() in Python; '
                    "or attnzoo.compose(PATH)",
                )
            load_zoo().recipes.find(recipe)
        source = loaded if recipe is None else load(recipe)
        assert source is not None
        if made_with is not None:
            source = replace(source, made_with=read_made_with(made_with))
            warn_of_others(source.made_with, 4)  # who called timm.create_model
        if isinstance(cfg, str):  # a tag
            cfg = get_pretrained_cfg(f"{name}.{cfg}", allow_unregistered=False) if cfg else None
        return build(source, arguments, pretrained=pretrained, pretrained_cfg=cfg)

    summary = loaded.recipe.summary if loaded else "A composed model; its recipe is an argument."
    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = HOSTS[kind].__name__
    entry_point.__doc__ = summary
    return entry_point

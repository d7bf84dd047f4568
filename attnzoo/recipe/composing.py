"""From a recipe to a model."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import PretrainedCfg, is_model
from torch import nn

from attnzoo.errors import RecipeError, UnknownArgument
from attnzoo.recipe.loading import load
from attnzoo.recipe.made_with import made_with
from attnzoo.recipe.origin import Origin, ends, second_stream
from attnzoo.recipe.reading import Loaded
from attnzoo.recipe.resolving import Composition, resolve

BUILDER = (
    "features_only",
    "out_indices",
    "feature_cls",
    "cache_dir",
    "pretrained_strict",
    "pretrained_model_args",
    "pretrained_cfg_overlay",
    "device",
    "dtype",
    "pruned",
    "use_naflex",
)
"""Arguments of `timm.create_model` that go to timm's builder, not to the model."""


NONE: Mapping[str, Any] = {}
"""No arguments."""


def compose(
    recipe: str | os.PathLike | Mapping[str, Any],
    *,
    edits: Sequence[str] = (),
    pretrained: bool = False,
    pretrained_cfg: PretrainedCfg | Mapping[str, Any] | None = None,
    **arguments,
) -> nn.Module:
    """The model of a recipe, as timm would hand it out.

    Args:
        recipe: Name (`ham_a`), file, text, or a dict of what the text would say.
        edits: Changes such as `attention.with.start=identity`.
        pretrained: Whether the weights are loaded that `pretrained_cfg`, or `pretrained_cfg_overlay`, names.
        pretrained_cfg: timm's description of those weights; the recipe's own model, without a place, when None.
        arguments: What `timm.create_model` takes: `num_classes`, `img_size`, `features_only`, `device`, ...

    Raises:
        RecipeError: what is wrong with the recipe, all at once.
        UnknownArgument: AZ309 an argument that the model does not take; a `TypeError` too.
    """
    return build(load(recipe, edits), arguments, pretrained=pretrained, pretrained_cfg=pretrained_cfg)


def compose_file(recipe: str | os.PathLike | Mapping[str, Any], edits: Sequence[str] = ()) -> Composition:
    """A recipe with every name known and every requirement met, not yet built; for those who want to look first."""
    return resolve(load(recipe, edits))


def build(
    recipe: Loaded | Composition,
    arguments: Mapping[str, Any] = NONE,
    *,
    pretrained: bool = False,
    pretrained_cfg: PretrainedCfg | Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model of a loaded recipe.

    Args:
        recipe: The recipe, or what it was resolved to.
        arguments: What `timm.create_model` takes.
        pretrained: Whether timm shall load weights.
        pretrained_cfg: timm's description of the weights; when None, that of the recipe's own model. As with timm's
            models it says what the weights were made for (their number of classes, their channels), whatever
            `arguments` ask for; what is handed over here is asked for too, unless `arguments` say otherwise.

    Raises:
        RecipeError: AZ306 no weights to load, AZ307 the lock `expect.params` does not hold.
        UnknownArgument: AZ309.
    """
    options = {name: arguments[name] for name in BUILDER if name in arguments}
    changed = {name: value for name, value in arguments.items() if name not in BUILDER and value is not None}
    loaded = recipe.loaded if isinstance(recipe, Composition) else recipe
    handed = (
        pretrained_cfg.to_dict() if isinstance(pretrained_cfg, PretrainedCfg) else dict(pretrained_cfg or {})
    )
    changed = _asked({**handed, **(options.get("pretrained_cfg_overlay") or {})}) | changed
    composition = recipe if isinstance(recipe, Composition) and not changed else resolve(loaded, changed)
    if composition.image is None:
        if pretrained:
            raise RecipeError(
                "AZ306",
                f"there are no published weights for `{loaded.name}`",
                help="`attnzoo compose RECIPE --init-from FILE` loads weights of your own",
            )
        for unknown in options.keys() - {"device", "dtype"}:
            raise UnknownArgument(
                "AZ309", f"a model of sequences takes no `{unknown}`", help="it takes `device` and `dtype`"
            )
        model = _signed(composition.build(**options), composition)
        if not changed:
            check_expectations(loaded, model)
        return model
    cfg = handed or composition.model_cfg()
    overlay = options.get("pretrained_cfg_overlay") or {}
    if pretrained and not any(
        {**cfg, **overlay}.get(key) for key in ("url", "file", "state_dict", "hf_hub_id")
    ):
        base = composition.info.base
        timm = f"model.load_state_dict(timm.create_model('{base}', pretrained=True).state_dict(), strict=False), or "
        raise RecipeError(
            "AZ306",
            f"there are no published weights for `{cfg.get('architecture', loaded.name)}`",
            help=f"load a base's weights instead: {timm if is_model(base) else ''}"
            "`attnzoo compose RECIPE --init-from FILE`",
        )
    model = _signed(composition.build(cfg, pretrained, **options), composition)
    if not changed and not options.get("features_only"):
        check_expectations(loaded, model)
    # what timm writes to config.json, so that it can build it again
    versions = made_with(composition.entries).model_dump(mode="json")
    vars(model)["_model_args"] = {**changed, "recipe": loaded.text, "made_with": versions}
    return model


def _asked(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that timm takes from a configuration when nobody says them, as our models have a fixed size."""
    asked = {}
    if cfg.get("num_classes", -1) >= 0:
        asked["num_classes"] = cfg["num_classes"]
    if cfg.get("input_size"):
        channels, *size = cfg["input_size"]
        asked["in_chans"] = channels
        if cfg.get("fixed_input_size", True):
            asked["img_size"] = tuple(size)
    return asked


def _signed(model: nn.Module, composition: Composition) -> nn.Module:
    """A model that remembers its recipe, for `attnzoo.describe`."""
    vars(model)["_origin"] = Origin(
        composition.loaded.name,
        *ends(composition.info, composition.pool is not None),
        second_stream(composition.info),
    )
    return model


def check_expectations(loaded: Loaded, model: nn.Module) -> None:
    """Hold a model to its recipe's `expect`, unless the recipe was edited.

    Raises:
        RecipeError: AZ307.
    """
    expected = loaded.recipe.expect.params
    found = sum(p.numel() for p in model.parameters())
    if expected is not None and found != expected and not loaded.edited:
        raise RecipeError(
            "AZ307",
            f"the model has {found:,} parameters, the recipe expects {expected:,}",
            place=loaded.source.value_place(("expect", "params")),
            help="correct the recipe, or the expectation if the change is meant",
        )

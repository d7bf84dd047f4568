"""From a recipe to a model."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import is_model
from torch import nn

from attnzoo.errors import RecipeError
from attnzoo.recipe.load import Loaded, load
from attnzoo.recipe.origin import Origin, ends
from attnzoo.recipe.resolve import Composition, resolve

BUILDER = ("features_only", "out_indices", "feature_cls", "cache_dir", "pretrained_strict", "pretrained_model_args",
           "pretrained_cfg_overlay", "device", "dtype", "pruned", "use_naflex")  # fmt: skip
"""Arguments of `timm.create_model` that go to timm's builder, not to the model."""


def compose(
    recipe: str | os.PathLike | Mapping[str, Any], *, edits: Sequence[str] = (), **arguments
) -> nn.Module:
    """The model of a recipe, as timm would hand it out.

    Args:
        recipe: Name (`ham_a`), file, text, or the same as a mapping.
        edits: Changes such as `attention.with.start=identity`.
        arguments: What `timm.create_model` takes: `num_classes`, `img_size`, `features_only`, `device`, ...

    Raises:
        RecipeError: what is wrong with the recipe, all at once.
    """
    return build(load(recipe, edits), arguments)


def compose_file(recipe: str | os.PathLike | Mapping[str, Any], edits: Sequence[str] = ()) -> Composition:
    """A recipe with every name known and every requirement met, not yet built; for those who want to look first."""
    return resolve(load(recipe, edits))


def build(
    loaded: Loaded, arguments: Mapping[str, Any], *, pretrained: bool = False, pretrained_cfg: Any = None
) -> nn.Module:
    """The model of a loaded recipe.

    Args:
        loaded: The recipe.
        arguments: What `timm.create_model` takes.
        pretrained: Whether timm shall load weights.
        pretrained_cfg: timm's configuration, when it comes with weights.

    Raises:
        RecipeError: AZ306 no weights to load, AZ307 the lock `expect.params` does not hold, AZ311 too large.
    """
    options = {name: arguments[name] for name in BUILDER if name in arguments}
    changed = {name: value for name, value in arguments.items() if name not in BUILDER and value is not None}
    composition = resolve(loaded, changed)
    _check_memory(composition)
    if composition.image is None:
        model = _signed(composition.build(**options), composition)
        if not changed:
            check_expectations(loaded, model)
        return model
    cfg = pretrained_cfg if isinstance(pretrained_cfg, Mapping) else composition.model_cfg()
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
    vars(model)["_model_args"] = {
        "recipe": loaded.text
    }  # what timm writes to config.json, so that it can build it again
    return model


def _signed(model: nn.Module, composition: Composition) -> nn.Module:
    """A model that remembers its recipe, for `attnzoo.describe`."""
    vars(model)["_origin"] = Origin(composition.loaded.name, *ends(composition.info))
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


def _check_memory(composition: Composition) -> None:
    need, there = composition.info.bytes, available_memory()
    if there and need > 0.8 * there and not os.environ.get("ATTNZOO_FORCE"):
        source = composition.loaded.source
        loc = ("host", "model") if ("host", "model") in source.values else ("host",)
        raise RecipeError(
            "AZ311",
            f"one training step needs {need / 2**30:,.1f} GiB or more; {there / 2**30:,.1f} GiB are free",
            place=source.value_place(loc),
            why=f"{composition.info.params:,} parameters, {composition.info.tokens:,} tokens",
            help="make the model smaller; ATTNZOO_FORCE=1 tries all the same",
        )


def available_memory() -> int:
    """Free memory of this machine, in bytes; 0 when unknown."""
    try:
        with open("/proc/meminfo") as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)
    except OSError:
        return 0

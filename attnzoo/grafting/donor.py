"""Donors: what builds a timm model again exactly, or why nothing does."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, is_model, model_entrypoint, parse_model_name, split_model_name_tag
from timm.models._input import get_model_args
from torch import Tensor, nn

from attnzoo.errors import ZooError, did_you_mean
from attnzoo.grafting.ledger import Donor
from attnzoo.hosts.info import unallocated
from attnzoo.recipe import load
from attnzoo.recipe.resolving import anonymous
from attnzoo.recipe.timm_models import registered
from attnzoo.recipe.weights import init_model
from attnzoo.train import open_run
from attnzoo.train.checkpoint import fingerprint

IGNORED = {"training", "grad_checkpointing", "fused_attn"}
"""What may differ between a donor and the same model built again: it changes how, not what is computed."""
_PLAIN = (bool, int, float, str, type(None))
_NO_DONOR = "hand over what `timm.create_model` gives, or its name"


class GraftError(ZooError):
    """A donor, a graft or a distillation is at fault (AZ94x)."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from a seed; afterwards PyTorch's go on as if nothing had been drawn.

    Args:
        seed: From 0.
    """
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        yield


def donor_model(
    donor: str | os.PathLike | nn.Module,
    weights: str | os.PathLike | None = None,
    *,
    pretrained: bool = False,
    seed: int = 0,
) -> tuple[nn.Module, list[str]]:
    """The donor as a model, with what a person should know of its weights.

    Args:
        donor: A model, which is handed back as it is; a name as `timm.create_model` takes it; the folder of a saved
            model, or of a run, whose best weights are taken.
        weights: A file that is loaded into it; of a model into a copy.
        pretrained: Whether timm shall download the weights of a name.
        seed: Of the initialisation of a name without weights.

    Raises:
        GraftError: AZ940, when timm cannot build it; AZ941 for a run on something other than images.
        RecipeError: AZ606 for a file of weights that does not fit.
        RunError: AZ80x, when a run cannot be read.
    """
    notes: list[str] = []
    if not isinstance(donor, nn.Module) and os.path.isdir(donor):
        if next(Path(donor).glob("step_*"), None) is not None:
            run = open_run(Path(donor))
            if run.kind != "images":
                raise GraftError("AZ941", f"`{os.fspath(donor)}` is no run on images", help=_NO_DONOR)
            donor = run.model("best")
        else:
            donor = f"local-dir:{os.fspath(donor)}"
    if isinstance(donor, nn.Module):
        model = donor if weights is None else rebuilt(*identified(donor), like=donor)
    else:
        name = os.fspath(donor)
        source, _ = _parsed(name)
        loads = bool(source) or pretrained
        model = _created(name, seed, pretrained=loads)
        if not loads and weights is None:
            notes.append(
                f"`{name}` was named without weights: it has timm's initialisation of seed {seed}, and knows nothing"
            )
    if weights is not None:
        missing = init_model(model, weights)["new"]
        if missing:
            notes.append(
                f"{len(missing)} tensors of the donor are not in `{os.fspath(weights)}` and keep their "
                f"initialisation: {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"
            )
    return model, notes


def _parsed(name: str) -> tuple[str, str]:
    """Where timm looks for a name (`local-dir`, `hf-hub`; empty for its registry), and the name there.

    Raises:
        GraftError: AZ940.
    """
    try:
        source, rest = parse_model_name(name)
    except ValueError as error:
        raise GraftError("AZ940", f"timm cannot read `{name[:200]}`: {error}", help=_NO_DONOR) from None
    if not source and not is_model(split_model_name_tag(rest)[0]):
        names = timm.list_models()
        raise GraftError(
            "AZ940",
            f"timm has no model called `{name[:200]}`",
            help=did_you_mean(split_model_name_tag(rest)[0], names)
            or "timm.list_models('vit*') shows its ViTs; `local-dir:FOLDER` names a saved one",
        )
    return source or "", rest


def _created(name: str, seed: int, **options: Any) -> nn.Module:
    """What timm builds under a name.

    Raises:
        GraftError: AZ940.
    """
    try:
        with seeded(seed):
            return timm.create_model(name, **options)
    except ZooError:
        raise
    except Exception as error:  # of timm, the hub, safetensors and json: whatever they stumble over
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise GraftError("AZ940", f"timm cannot build `{name[:200]}`", why=reason, help=_NO_DONOR) from None


def identified(model: nn.Module) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The architecture, the arguments and timm's configuration that build a model again.

    Args:
        model: Of timm, or a composed one.

    Raises:
        GraftError: AZ940, when they are not known, or build something else.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    cfg = cfg.to_dict() if isinstance(cfg, PretrainedCfg) else dict(cfg or {})
    architecture = cfg.get("architecture") or ""
    if not is_model(architecture):
        raise GraftError(
            "AZ940",
            f"it is not known how this {type(model).__name__} was built",
            why="its `pretrained_cfg` names no model of timm",
            help=_NO_DONOR,
        )
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise GraftError(
            "AZ940", "the donor has no weights: it is on the device `meta`", help="load its weights first"
        )
    # timm leaves rates of dropout out of what it says, since they do not matter to who loads weights
    arguments = _lists({**getattr(model, "_model_args", {}), **get_model_args(model)})
    if "recipe" in arguments and architecture not in registered:  # timm's loading knows the base alone
        architecture = anonymous(load(arguments["recipe"]).recipe.host.kind)
    cfg = _lists({key: value for key, value in cfg.items() if value is not None and key != "state_dict"})
    try:
        with unallocated():
            again = _again(architecture, arguments, cfg)
    except Exception as error:  # whatever timm says of arguments that do not go together any more
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise _other(f"timm cannot build it with {arguments}: {reason}") from None
    if difference := _difference(model, again):
        raise _other(difference)
    return architecture, arguments, cfg


def _other(why: str) -> GraftError:
    return GraftError(
        "AZ940",
        "the donor cannot be built again as it is",
        why=why,
        help="hand over a model as `timm.create_model` gives it, without parts that were put in later",
    )


def _again(architecture: str, arguments: Mapping[str, Any], cfg: Mapping[str, Any]) -> nn.Module:
    """What timm's builder makes; no name of a file or of the hub is among what it is told."""
    model = model_entrypoint(architecture)(
        pretrained=False, pretrained_cfg=_tuples(cfg), **_tuples(arguments)
    )
    vars(model)["_model_args"] = dict(arguments)  # as `timm.create_model` does
    return model


def _lists(data: Mapping[str, Any]) -> dict[str, Any]:
    """timm's tuples as JSON has them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """Lists, as JSON has them, as timm's tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def rebuilt(
    architecture: str, arguments: Mapping[str, Any], cfg: Mapping[str, Any], *, like: nn.Module | None = None
) -> nn.Module:
    """The model that `identified` describes.

    Args:
        architecture, arguments, cfg: From there.
        like: The model it shall be a copy of: its tensors, their types, its mode; none for timm's initialisation.

    Raises:
        GraftError: AZ943, when timm builds nothing from it.
    """
    try:
        with seeded(0):
            model = _again(architecture, arguments, cfg)
    except Exception as error:  # whatever timm says of an unknown name or other arguments
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise GraftError(
            "AZ943",
            f"timm cannot build the donor `{architecture[:100]}` again",
            why=reason,
            help="hand over the folder as `attnzoo graft --out` wrote it, with the same timm",
        ) from None
    return model if like is None else filled(model, like.state_dict(), like)


def filled(model: nn.Module, state: Mapping[str, Tensor], like: nn.Module) -> nn.Module:
    """A model with other tensors in the place of its own, as types and devices of theirs.

    Args:
        model: It is changed.
        state: A tensor for each of its own; copied.
        like: Where it shall be, and in which mode.
    """
    first = next(iter(state.values()))
    model.to(device=first.device, dtype=first.dtype if first.is_floating_point() else None)
    model.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, assign=True)
    return model.train(like.training)


def described(model: nn.Module) -> Donor:
    """What builds a model again, and the fingerprint of its tensors.

    Args:
        model: As for `identified`.

    Raises:
        GraftError: AZ940.
    """
    architecture, arguments, cfg = identified(model)
    recipe = arguments.get("recipe")
    return Donor(
        name=architecture if recipe is None else load(recipe).name,
        architecture=architecture,
        arguments=arguments,
        pretrained_cfg=cfg,
        sha256=fingerprint(model.state_dict()),
    )


def _difference(model: nn.Module, again: nn.Module) -> str:
    """Where two models are not the same but for their numbers, in words; empty where they are."""
    mine, theirs = model.state_dict(), again.state_dict()
    for name in [*mine, *theirs]:
        if name not in theirs or name not in mine:
            has, lacks = (
                ("the donor", "what timm builds") if name in mine else ("what timm builds", "the donor")
            )
            return f"{has} has a tensor `{name}`, {lacks} has not"
        if mine[name].shape != theirs[name].shape:
            return f"`{name}` is {tuple(mine[name].shape)}, what timm builds has {tuple(theirs[name].shape)}"
    modules = dict(again.named_modules())
    for path, module in model.named_modules():
        shown = f"`{path}`" if path else "the donor"
        other = modules.pop(path, None)
        if other is None or type(module) is not type(other):
            what = f"a {type(other).__name__}" if other is not None else "nothing"
            return f"{shown} is a {type(module).__name__}, what timm builds has {what} there"
        for key, value in _facts(module).items():
            if key in vars(other) and _facts(other).get(key, value) != value:
                return f"`{key}` of {shown} is {value!r}, what timm builds has {_facts(other)[key]!r}"
    return f"what timm builds has a module `{next(iter(modules))}`, the donor has not" if modules else ""


def _facts(module: nn.Module) -> dict[str, Any]:
    """What a module knows of itself beside tensors and parts: numbers, words, and tuples of them."""
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_")
        and key not in IGNORED
        and (
            isinstance(value, _PLAIN)
            or (isinstance(value, tuple) and all(isinstance(v, _PLAIN) for v in value))
        )
    }

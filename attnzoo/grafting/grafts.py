"""A recipe put into a trained model, and the model without it again."""

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attnzoo.core import Law
from attnzoo.errors import RecipeError
from attnzoo.files import open_file
from attnzoo.grafting.donor import (
    GraftError,
    described,
    donor_model,
    filled,
    rebuilt,
    seeded,
)
from attnzoo.grafting.ledger import Donor, Ledger
from attnzoo.grafting.places import matched, rows
from attnzoo.hosts.given import stand_ins, taken
from attnzoo.recipe import Composition, Loaded, build, load, resolve
from attnzoo.recipe.weights import save
from attnzoo.zoo import Zoo, load_zoo
from attnzoo.zoo.blame import OURS

Start = Literal["identity", "recipe"]
"""Whether fusions start as their first branch where they can, or as the recipe says."""
FILES = ("config.json", "model.safetensors", "ledger.json", "dropped.safetensors")
"""What a saved graft is: the first two are timm's; the third says what became of every tensor, the last holds what the
graft does not hold of the donor as it is."""
_STATISTICS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
"""What timm's configuration says of images, and a graft takes from its donor."""


@dataclass(frozen=True)
class Graft:
    """What a graft remembers, so that it can be undone.

    Args:
        ledger: What became of every tensor.
        dropped: The donor's tensors that the graft does not hold as they are, by name.
    """

    ledger: Ledger
    dropped: Mapping[str, Tensor]


def graft(
    donor: str | os.PathLike | nn.Module,
    recipe: str | os.PathLike | Mapping[str, Any],
    *,
    edits: Sequence[str] = (),
    start: Start = "identity",
    weights: str | os.PathLike | None = None,
    pretrained: bool = False,
    seed: int = 0,
) -> tuple[nn.Module, Ledger]:
    """Put a recipe's mechanisms, heads, skip and pool into a timm ViT; its weights go where the same thing lives.

    The donor stays as it is. What the recipe says of its host gives way to what the donor is.

    Args:
        donor: A timm model built on VisionTransformer or Eva, or a composed one; or a name as `timm.create_model` takes
            it, `local-dir:FOLDER` among them; or the folder of a run.
        recipe: Name, file, text, or a dict of what the text would say.
        edits: Changes of the recipe such as `attention.with.window=5`.
        start: `identity` lets fusions that begin with `softmax` start as it, so that the first outputs are the donor's
            bit for bit; `recipe` leaves them as they are.
        weights: A file of weights for the donor.
        pretrained: Whether timm shall download the weights of a donor that is named.
        seed: Of what is new; and of a donor that is named without weights.

    Returns:
        The graft, where the donor is and in its mode; and its ledger.

    Raises:
        GraftError: AZ940 for a donor that cannot be built again exactly, AZ941 for a recipe of another kind.
        RecipeError: what is wrong with the recipe, or does not fit the donor.
    """
    model, notes = donor_model(donor, weights, pretrained=pretrained, seed=seed)
    found = described(model)
    loaded, arguments = for_donor(load(recipe, edits), found)
    if loaded.recipe.pool is not None:  # the norm before the head stays where the donor has it
        arguments["fc_norm"] = not isinstance(getattr(model, "fc_norm", None), nn.Identity | None)
    loaded, told = started(loaded, start)
    composition = resolve(loaded, arguments)
    cfg = composition.model_cfg()
    cfg |= {key: found.pretrained_cfg[key] for key in _STATISTICS if key in found.pretrained_cfg}
    with seeded(seed):
        made = build(loaded, arguments, pretrained_cfg=cfg)
    state, origins = model.state_dict(), matched(model.state_dict(), made, _pools(model, made))
    _planted(made, model, {name: origin.tensor for name, origin in origins.items()})
    _same_tables(model, made)
    difference = first_difference(model, made)
    ledger = Ledger(
        donor=found,
        recipe=loaded.name,
        rows=rows(state, made.state_dict(), origins),
        difference=difference,
        notes=(*notes, *told, _first_outputs(difference, composition)),
    )
    held = ledger.held()
    dropped = {name: tensor.detach().clone() for name, tensor in state.items() if name not in held}
    vars(made)["_graft"] = Graft(ledger, dropped)
    return made, ledger


def ungraft(graft: nn.Module | str | os.PathLike) -> nn.Module:
    """The donor again: bit for bit, as long as the graft was not trained.

    What the graft holds of the donor is taken as it is there: after training it is the trained tensor. What it does not
    hold comes as it was.

    Args:
        graft: What `graft` gave, or the folder in which it was saved.

    Raises:
        GraftError: AZ942 for a model that is no graft, AZ943 for a folder that holds none, or a damaged one.
    """
    if isinstance(graft, nn.Module):
        kept, state, like = vars(graft).get("_graft"), graft.state_dict(), graft
        if not isinstance(kept, Graft):
            raise GraftError(
                "AZ942",
                f"this {type(graft).__name__} is no graft that remembers its donor",
                why="timm builds a saved graft from its configuration alone",
                help="hand over what `attnzoo.graft` gave, or the folder in which it was saved",
            )
        ledger, dropped = kept.ledger, kept.dropped
    else:
        (ledger, state, dropped), like = _read(Path(graft)), None
    donor = rebuilt(ledger.donor.architecture, ledger.donor.arguments, ledger.donor.pretrained_cfg)
    whole = {name: state[own] for name, own in ledger.held().items() if own in state} | dict(dropped)
    own = donor.state_dict()
    for name in [*own, *whole]:
        if name not in whole or name not in own or whole[name].shape != own[name].shape:
            what = "a folder that is no whole graft" if like is None else "a model that is no graft any more"
            raise GraftError(
                "AZ943",
                f"{what}: `{name}` of the donor is missing or of another shape",
                help="hand over the folder as `attnzoo graft --out` wrote it",
            )
    return filled(donor, whole, like or donor)


def save_graft(graft: nn.Module, folder: str | os.PathLike) -> None:
    """Write a graft: what `timm.create_model("local-dir:FOLDER", pretrained=True)` loads, and what `ungraft` needs.

    Args:
        graft: What `graft` gave, trained or not.
        folder: Is made; must hold no model.

    Raises:
        GraftError: AZ942 for a model that is no graft.
        RecipeError: AZ607, when the folder cannot be written or already holds a model.
    """
    kept = vars(graft).get("_graft")
    if not isinstance(kept, Graft):
        raise GraftError(
            "AZ942",
            f"this {type(graft).__name__} is no graft that remembers its donor",
            help="hand over what `attnzoo.graft` gave",
        )
    folder = Path(folder)
    refuse_taken(folder)
    try:
        ledger = kept.ledger.model_dump_json(indent=2)
    except ValueError as error:
        raise GraftError(
            "AZ940",
            "an argument of the donor cannot be written down",
            why=str(error).splitlines()[0],
            help="build the donor with numbers and words: `timm.create_model(NAME, ...)`",
        ) from None
    save(graft, folder)
    try:
        (folder / "ledger.json").write_text(ledger + "\n", encoding="utf-8")
        save_file(
            {name: tensor.contiguous() for name, tensor in kept.dropped.items()},
            folder / "dropped.safetensors",
        )
    except OSError as error:
        raise RecipeError(
            "AZ607", f"cannot write to `{folder}`: {(error.strerror or str(error)).lower()}"
        ) from None


def refuse_taken(folder: Path) -> None:
    """Refuse a folder in which a graft would overwrite something.

    Raises:
        RecipeError: AZ607.
    """
    if folder.exists() and not folder.is_dir():
        raise RecipeError("AZ607", f"`{folder}` is no folder", help="name another folder")
    taken = [name for name in FILES if (folder / name).exists()]
    if taken:
        raise RecipeError("AZ607", f"`{folder}` already holds {', '.join(taken)}", help="name another folder")


def ledger_of(folder: str | os.PathLike) -> Ledger:
    """The ledger of a saved graft.

    Args:
        folder: Where it was saved.

    Raises:
        GraftError: AZ943.
    """
    return _read(Path(folder))[0]


def _read(folder: Path) -> tuple[Ledger, dict[str, Tensor], dict[str, Tensor]]:
    """The ledger, the graft's tensors and the donor's others.

    Raises:
        GraftError: AZ943.
    """
    help = "name a folder that `attnzoo graft --out` wrote"
    try:
        with open_file(folder / "ledger.json") as file:
            ledger = Ledger.model_validate_json(file.read())
        with (
            open_file(folder / "model.safetensors", most=None),
            open_file(folder / "dropped.safetensors", most=None),
        ):
            return ledger, load_file(folder / "model.safetensors"), load_file(folder / "dropped.safetensors")
    except OSError as error:
        name = Path(error.filename or "").name or "a file"
        reason = (error.strerror or str(error)).lower()
        raise GraftError("AZ943", f"`{folder}` holds no graft: `{name}`: {reason}", help=help) from None
    except (ValidationError, safetensors.SafetensorError) as error:
        why = " ".join(str(error).split())[:200]
        raise GraftError("AZ943", f"`{folder}` holds no sound graft", why=why, help=help) from None


def for_donor(loaded: Loaded, donor: Donor) -> tuple[Loaded, dict[str, Any]]:
    """A recipe on the donor's host, and the arguments that this is built with.

    Args:
        loaded: The recipe.
        donor: What builds the donor again.

    Raises:
        GraftError: AZ941, when one of them is of another kind than a ViT of timm's.
        RecipeError: what is wrong with the recipe of a composed donor.
    """
    arguments = dict(donor.arguments)
    text = arguments.pop("recipe", None)
    arguments.pop("made_with", None)  # of the donor; the graft has its own
    own = load(text).source.tree["host"] if text is not None else {"base": donor.architecture}
    wanted, there = loaded.recipe.host.kind, own.get("kind", "vit")
    for kind, what in ((there, f"the donor `{donor.architecture}`"), (wanted, f"the recipe `{loaded.name}`")):
        if kind != "vit":
            raise GraftError(
                "AZ941",
                f"{what} is of kind `{kind}`, and only kind `vit` can be grafted",
                why="mechanisms go where timm's VisionTransformer and Eva have their attention",
                help="take a timm ViT and a recipe whose host is `kind: vit`",
            )
    host: dict[str, Any] = {"kind": "vit", "base": own.get("base", "vit_base_patch16_224")}
    if model := own.get("model"):
        host["model"] = model
    host |= {key: list(donor.pretrained_cfg[key]) for key in ("mean", "std") if key in donor.pretrained_cfg}
    if "init" in loaded.source.tree["host"]:
        host["init"] = loaded.source.tree["host"]["init"]
    tree = {key: value for key, value in loaded.source.tree.items() if key not in ("host", "expect")}
    if loaded.recipe.pool is not None:  # it takes the place of the donor's own
        arguments.pop("global_pool", None)
        host["model"] = {k: v for k, v in host.get("model", {}).items() if k != "global_pool"}
    return load({**tree, "host": host, "name": loaded.name}), arguments


def started(loaded: Loaded, start: Start) -> tuple[Loaded, list[str]]:
    """A recipe whose fusions start as their first branch, where that is `softmax`; and what was changed, in words.

    A `start` that the recipe says stays.

    Args:
        loaded: The recipe.
        start: `recipe` changes nothing.
    """
    if start == "recipe":
        return loaded, []
    tree, zoo = deepcopy(loaded.source.tree), load_zoo()
    puts = [(tree, "attention"), *((override, "put") for override in tree.get("overrides") or ())]
    changed = False
    for holder, key in puts:
        spec = _as_identity(holder[key], zoo)
        if spec is not None and spec != holder[key]:
            holder[key], changed = spec, True
    if not changed:
        return loaded, []
    return load(tree), ["`start: identity` was set, so that fusions start as their first branch"]


def _as_identity(spec: Any, zoo: Zoo) -> Any:
    """A spec that starts as `softmax`; None for one that cannot."""
    if isinstance(spec, str) or (isinstance(spec, dict) and "use" in spec):
        name = spec if isinstance(spec, str) else spec["use"]
        entry = zoo.mechanisms.find(name)
        return spec if (entry.plugin, entry.name) == (OURS, "softmax") else None
    if not isinstance(spec, dict):  # an empty site
        return None
    options, fusion = spec.get("with") or {}, zoo.fusions.find(spec["fuse"]).value
    first = _as_identity(spec["of"][0], zoo)
    if (
        first is None
        or Law.IDENTITY_START not in fusion.card.laws
        or options.get("start", "identity") != "identity"
    ):
        return None
    return {**spec, "of": [first, *spec["of"][1:]], "with": {**options, "start": "identity"}}


def _pools(donor: nn.Module, made: nn.Module) -> dict[str, str]:
    """Beginnings of names in the graft's pool, each with that of the donor's pool of the same class."""
    theirs, mine = getattr(donor, "attn_pool", None), getattr(made, "_modules", {}).get("pool")
    if not isinstance(theirs, nn.Module) or not isinstance(mine, nn.Module):
        return {}
    return {
        f"pool.{name}.": "attn_pool." for name, part in mine.named_children() if type(part) is type(theirs)
    }


def _planted(made: nn.Module, donor: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Put the donor's tensors in, with their types and places; what is new goes where the first of the donor's is."""
    first = next(donor.parameters())
    made.to(device=first.device, dtype=first.dtype).train(donor.training)
    wanted = {name: parameter.requires_grad for name, parameter in donor.named_parameters()}
    shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
    state = {name: tensor.detach().reshape(shapes[name]).clone() for name, tensor in found.items()}
    made.load_state_dict(state, strict=False, assign=True)
    for name, parameter in made.named_parameters():
        if name in found:
            parameter.requires_grad_(wanted.get(name, True))


def _same_tables(donor: nn.Module, made: nn.Module) -> None:
    """Refuse a donor whose tables that are not saved, as those of rotary positions, are others than the graft's.

    Raises:
        GraftError: AZ940.
    """
    theirs, saved = dict(made.named_buffers()), donor.state_dict()
    for name, table in donor.named_buffers():
        other = theirs.get(name)
        if name not in saved and other is not None and not torch.equal(table, other):
            raise GraftError(
                "AZ940",
                "the donor cannot be built again as it is",
                why=f"its buffer `{name}`, which is not saved with it, is another than timm makes",
                help="hand over a model as `timm.create_model` gives it",
            )


@torch.no_grad()
def first_difference(donor: nn.Module, made: nn.Module) -> float | None:
    """The largest difference between the outputs of two models for one image of noise, in eval mode.

    Args:
        donor, made: Of the same images; their modes stay.

    Returns:
        0 for equal bits; None where nothing can be compared, since the shapes differ or something is not finite.
    """
    (model, other) = (deepcopy(one).eval() if one.training else one for one in (donor, made))
    first = next(donor.parameters())
    host: Any = donor
    noise = torch.randn(
        1, host.in_chans, *host.patch_embed.img_size, generator=torch.Generator().manual_seed(0)
    )
    images = noise.to(first.device, first.dtype)
    one = model(images, **stand_ins(images, taken(model)))
    two = other(images, **stand_ins(images, taken(other)))
    if one.shape != two.shape or not bool(one.isfinite().all() & two.isfinite().all()):
        return None
    if torch.equal(one, two):
        return 0.0
    return max(float((one.double() - two.double()).abs().max()), torch.finfo(torch.float32).tiny)


def _first_outputs(difference: float | None, composition: Composition) -> str:
    """What is to be said of the first outputs."""
    if difference == 0:
        return "the first outputs are the donor's, bit for bit"
    if difference is None:
        return (
            "the first outputs cannot be compared with the donor's: they have other shapes, or are not finite"
        )
    reasons = []
    others = dict.fromkeys(str(plan) for plan in composition.plans.values() if not plan.starts_as_softmax())
    if others:
        verb = "does" if len(others) == 1 else "do"
        names = " and ".join(f"`{formula}`" for formula in others)
        reasons.append(f"{names} {verb} not start as the donor's attention")
    if composition.skip:
        reasons.append(f"`skip: {composition.skip.use}` joins layers that the donor keeps apart")
    if composition.pool is not None:
        reasons.append(f"`pool: {composition.pool.entry.name}` takes the place of the donor's")
    why = "; ".join(reasons) or "the donor's attention is another than `softmax`"
    return f"the first outputs are not the donor's: logits differ by up to {difference:.3g}, since {why}"

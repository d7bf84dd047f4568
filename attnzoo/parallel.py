"""Heads over devices: torch's tensor parallelism for every `MultiHead`, and for timm's MLPs.

Hè and Kabić, arXiv:2302.06218: a device has the projections of its own heads, columns before the heads and rows behind
them, and what the devices give is added up.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from attnzoo.core import NO_MASK, Component, Fused, Fusion, Head, Law, Mask, Mechanism, MultiHead, find_taps
from attnzoo.core.component import NOTHING
from attnzoo.errors import Diagnostic, ZooError

__all__ = ["gathered", "tensor_parallel"]

KINDS = {"qkv": 3, "q": 1, "kv": 2}
"""Projections before the heads, and of how many kinds their rows are: queries, keys, values."""
HELP = "change it, or let every device compute it whole: tensor_parallel(..., rest='replicate')"


def tensor_parallel(
    model: nn.Module, mesh: DeviceMesh, *, rest: Literal["refuse", "replicate"] = "refuse"
) -> nn.Module:
    """Divides a model among the devices of a mesh, in place: each computes its share of the heads of every `MultiHead`.

    Every device takes the whole input and gives the whole output. MLPs are divided by their hidden channels; all else
    is on every device. Weights are those of the mesh's first device. All parameters become `DTensor`s under their own
    names, so optimisers and `torch.nn.utils.clip_grad_norm_` do what they do for the whole model. The rows of `qkv` and
    `kv` stand head by head; `gathered` puts them back. Taps and caches are those of the device's own heads.

    Args:
        model: Holds `MultiHead`s, or is one; has its weights, and is on its device.
        mesh: Devices in one dimension.
        rest: Whether mechanisms and MLPs that cannot be divided are refused, or computed whole on every device, which
            is right and saves nothing.

    Returns:
        The same model.

    Raises:
        ZooError: AZ412, with all that cannot be divided, before anything is changed.
    """
    parts, size = _parts(model), mesh.size()
    reasons = {name: _reason(part, size) for name, part in parts.items()}
    faults = [
        Diagnostic(
            "AZ412", f"`{name or 'model'}` cannot be divided among {size} devices: {reason}", help=HELP
        )
        for name, reason in reasons.items()
        if reason and rest == "refuse"
    ]
    if rest == "refuse" and not any(isinstance(part, MultiHead) for part in parts.values()):
        faults += [
            Diagnostic("AZ412", "there are no heads to divide: the model holds no `MultiHead`", help=HELP)
        ]
    if mesh.ndim != 1:
        text = f"heads are divided among devices in one dimension; this mesh has {mesh.ndim}"
        faults += [Diagnostic("AZ412", text, help="hand over one of them: mesh['tensor']")]
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        faults += [Diagnostic("AZ412", "this model is divided already", help="divide a whole one")]
    if faults:
        raise ZooError.of(faults)
    for name, part in parts.items():
        if not reasons[name]:
            _divide(part, mesh) if isinstance(part, MultiHead) else _divide_mlp(part, mesh)
    seen: dict[Tensor, Tensor] = {}
    for inner in model.modules():
        _hold(inner, mesh, set(), summed=False, seen=seen)
    return model


@torch.no_grad()
def gathered(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the whole model, on every device: what it would be, had `tensor_parallel` not divided it.

    To go on from it, load it into a whole model, and divide that one.

    Args:
        model: What was divided. Every device must call this.
    """
    state = {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in model.state_dict().items()}
    for name, part in model.named_modules(remove_duplicate=False):
        if isinstance(part, MultiHead) and isinstance(part.inner, _SomeHeads):
            for projection, kinds in _projections(part):
                for key in (f"{name}.{projection}.{entry}".lstrip(".") for entry in ("weight", "bias")):
                    if key in state:
                        rows = state[key].unflatten(0, (-1, kinds, part.head_dim))
                        state[key] = rows.transpose(0, 1).flatten(0, 2)
    return state


# What can be divided


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """What mixes tokens, by name, branches in the place of their fusion, and timm's MLPs; nothing of what is within."""
    found: dict[str, nn.Module] = {}
    within: set[nn.Module] = set()
    for name, part in model.named_modules():
        mixes = isinstance(part, Mechanism) and not isinstance(part, Fused)
        if part not in within and (mixes or type(part) is Mlp and isinstance(part.fc1, nn.Linear)):
            found[name] = part
            within.update(part.modules())
    return found


def _projections(part: MultiHead) -> list[tuple[str, int]]:
    """The projections before the heads, each with how many kinds of rows it has."""
    return [(name, kinds) for name, kinds in KINDS.items() if hasattr(part, name)]


def _reason(part: Any, size: int) -> str:
    """Why a mechanism or an MLP cannot be divided; empty where it can."""
    if isinstance(part, Mlp):
        hidden: int = part.fc1.out_features  # type: ignore[union-attr, assignment]
        if not isinstance(part.norm, nn.Identity):
            return "its norm is that of all hidden channels"
        return f"{hidden} hidden channels are no multiple of {size}" if hidden % size else ""
    if not isinstance(part, MultiHead):
        return f"`{part.card.name}` has projections of its own, or none"
    if not part.qkv_fused:
        return "its queries, keys and values have a projection each"
    if part.q_bias is not None:
        return "its biases stand beside the projection"
    if part.rotation and part.rotation[0] > 1:
        return "the host turns every head in its own way"
    card, linears = part.card, [getattr(part, name) for name, _ in (*_projections(part), ("proj", 1))]
    inside = [inner for inner in part.inner.modules() if isinstance(inner, Component | Fusion)]
    reasons = {
        f"`{card.name}` does not claim the law `heads_apart`": Law.HEADS_APART not in card.laws,
        f"`{card.name}` adds to the loss what all heads show": any(inner.card.auxiliary for inner in inside),
        f"{part.heads} heads are no multiple of {size}": bool(part.heads % size),
        "`scale_norm` is that of all heads": not isinstance(part.norm, nn.Identity),
        "the skip between layers has a norm of all heads": not isinstance(part.skip, nn.Identity),
        "the rollout is a mean over all heads": any(tap.of_all_heads for tap in find_taps(part).values()),
        "its projections are no plain `nn.Linear`": any(type(linear) is not nn.Linear for linear in linears),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


# Dividing


@contextmanager
def _own_chance(mesh: DeviceMesh, device: torch.device) -> Iterator[None]:
    """Random numbers of this device alone; behind it all devices go on with the same state, if they had the same."""
    seed = int(torch.randint(2**62, ())) + mesh.get_local_rank()
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield


class _SomeHeads(Head):
    """The heads of one device: in front of a head's own class. Pairs by head are those of all heads."""

    mesh: DeviceMesh

    def forward(self, q, k, v, *, mask: Mask = NO_MASK, layout, given=NOTHING):
        if mask.pairs is not None and mask.pairs.shape[1] > 1:
            own = mask.pairs.tensor_split(self.mesh.size(), dim=1)[self.mesh.get_local_rank()]
            mask = replace(mask, pairs=own)
        if not (self.training and self.attn_drop):
            return super().forward(q, k, v, mask=mask, layout=layout, given=given)
        with _own_chance(self.mesh, q.device):
            return super().forward(q, k, v, mask=mask, layout=layout, given=given)


class _SomeDropout(nn.Dropout):
    """Drops channels of which each device has others."""

    mesh: DeviceMesh

    def forward(self, x):
        if not (self.training and self.p):
            return super().forward(x)
        with _own_chance(self.mesh, x.device):
            return super().forward(x)


def _become(part: Any, *before: type, **attributes: Any) -> None:
    """Gives this one module a class of its own: its class, with other classes before it and these attributes."""
    cls = type(part)
    part.__class__ = type(cls.__name__, (*before, cls), {"__module__": cls.__module__, **attributes})


def _divide(part: MultiHead, mesh: DeviceMesh) -> None:
    """Projections by their columns and rows, and the head's own tensors by their leading axis."""
    d = part.head_dim
    for name, kinds in _projections(part):
        linear = getattr(part, name)
        if isinstance(linear.weight, DTensor):
            continue  # another `MultiHead` has it too, as it may have the head
        # rows (kinds h d) as (h kinds d), so that every share has whole heads
        for tensor in linear.parameters():
            tensor.data = tensor.data.unflatten(0, (kinds, -1, d)).transpose(0, 1).flatten(0, 2)
        parallelize_module(linear, mesh, ColwiseParallel())

        def as_before(_linear: nn.Module, _inputs: tuple, out: Tensor, kinds: int = kinds) -> Tensor:
            return out.unflatten(-1, (-1, kinds, d)).transpose(-3, -2).flatten(-3)  # (b n kinds*h*d) again

        linear.register_forward_hook(as_before)
    if not isinstance(part.proj.weight, DTensor):
        parallelize_module(part.proj, mesh, RowwiseParallel())
    for module in (part.q_norm, part.k_norm):
        for inner in module.modules():
            _hold(inner, mesh, set(), summed=True)
    head = part.inner
    if isinstance(head, _SomeHeads):
        return
    whole = head.shared()
    for name, inner in head.named_modules():
        if isinstance(inner, Component):
            inner.heads //= mesh.size()
        names = {own: f"{name}.{own}".lstrip(".") for own in (*inner._parameters, *inner._buffers)}
        _hold(inner, mesh, {own for own, full in names.items() if full not in whole}, summed=True)
    _become(head, _SomeHeads, mesh=mesh)


def _divide_mlp(mlp: Any, mesh: DeviceMesh) -> None:
    parallelize_module(mlp, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    _become(mlp.drop1, _SomeDropout, mesh=mesh)


def _hold(
    part: nn.Module,
    mesh: DeviceMesh,
    sliced: set[str],
    *,
    summed: bool,
    seen: dict[Tensor, Tensor] | None = None,
) -> None:
    """Makes a module's own tensors `DTensor`s, of which its code sees what this device has.

    Args:
        part: The module.
        mesh: The devices.
        sliced: Names of those that are divided by their leading axis; the others are whole on every device.
        summed: Whether devices have different gradients of what is whole, which are then added up.
        seen: What parameters became that other modules may hold too.
    """
    seen = {} if seen is None else seen
    views: dict[str, property] = {}
    for name, tensor in (*part._parameters.items(), *part._buffers.items()):
        if tensor is None or isinstance(tensor, DTensor):
            continue
        if tensor not in seen:
            held = distribute_tensor(tensor.detach(), mesh, [Shard(0) if name in sliced else Replicate()])
            if isinstance(tensor, nn.Parameter):
                seen[tensor] = nn.Parameter(held, tensor.requires_grad)
            else:  # what a module keeps for itself it changes in place, on every device alike
                seen[tensor] = held if name in sliced else held.to_local()
        setattr(part, name, seen[tensor])
        if not isinstance(seen[tensor], DTensor):
            continue
        views[name] = _view(name, mesh, summed and name not in sliced)
    if views:
        _become(part, **views)


def _view(name: str, mesh: DeviceMesh, summed: bool) -> property:
    """What a module's code sees under a name: this device's share."""

    def local(part: nn.Module) -> Tensor:
        held = part._parameters[name] if name in part._parameters else part._buffers[name]
        assert isinstance(held, DTensor)
        if held.device_mesh != mesh:  # divided further, by `fully_shard`, until the next forward
            return held
        own = held.to_local()
        if not summed:
            return own
        # in the forward nothing, in the backward the sum over devices
        return DTensor.from_local(own, mesh, [Replicate()], run_check=False).to_local(
            grad_placements=[Partial()]
        )

    return property(local)

"""Every place of a model where it can be looked into or edited, whatever mechanism is there."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from attnzoo.core import Head, KVCache, Layout, Tap, find_taps
from attnzoo.core.intervention import Here
from attnzoo.core.mask import NO_MASK
from attnzoo.errors import ZooError, did_you_mean
from attnzoo.hosts.layers import Layer
from attnzoo.lab.maps import _branches
from attnzoo.lab.sites import sites_of

Edit = Callable[[Tensor, Here], Tensor | None]
"""What looks at a tensor; what it returns, if anything, takes the place of the tensor."""
MLPS = ("mlp", "ffn", "feed_forward")
"""What hosts call the MLP of a block."""


@dataclass(frozen=True, eq=False)
class Leaf:
    """A mechanism or head that is no wrapper of others, and where it is.

    Args:
        site: Name of the site.
        layer: Which site of the model it is, from 0.
        branch: Name of the branch.
        component: The mechanism or head itself.
        outer: What is put at the site.
        block: The block that the site is in.
        mlp: The MLP of that block; None where there is none.
    """

    site: str
    layer: int
    branch: str
    component: Any
    outer: nn.Module
    block: nn.Module
    mlp: nn.Module | None

    @property
    def heads(self) -> int:
        """Number of its heads."""
        return int(self.component.tap_heads)

    @property
    def mechanism(self) -> str:
        """Name of the mechanism."""
        return self.component.card.name

    @property
    def name(self) -> str:
        """Site and branch: `blocks.3`, or `blocks.3 softmax` where a site has several."""
        inner = getattr(self.outer, "inner", self.outer)
        return self.site if inner is self.component else f"{self.site} {self.branch}"

    def taps(self, kind: str) -> list[Tap]:
        """Its taps of a kind that show a map of tokens, (b h n m)."""
        return [
            tap
            for tap in find_taps(self.component, kind).values()
            if tap.axes.split() == ["b", "h", "n", "m"]
        ]

    def lacks(self, kind: str) -> str:
        """Why it cannot be edited there; empty when it can.

        Args:
            kind: One of `EDITS`.
        """
        if kind in ("scores", "weights") and not self.taps(kind):
            return f"`{self.mechanism}` forms no {kind} of tokens"
        if kind == "heads" and not isinstance(self.component, Head):
            return f"`{self.mechanism}` does not work inside the heads of a projection"
        if kind == "mlp" and self.mlp is None:
            return f"the block of `{self.site}` has no MLP"
        return ""


def leaves(model: nn.Module) -> list[Leaf]:
    """The mechanisms and heads of a model that are no wrappers of others, in the order of layers, then of branches.

    Args:
        model: A composed model, or one of timm's inside of `tapped`.

    Raises:
        ZooError: AZ903, when there is none.
    """
    found, paths = [], {module: path for path, module in model.named_modules()}
    for layer, (site, outer) in enumerate(sites_of(model).items()):
        block = _block(model, paths[outer])
        mlp = next((m for name in MLPS if isinstance(m := getattr(block, name, None), nn.Module)), None)
        for branch, component in _branches(outer):
            found.append(Leaf(site, layer, branch, component, outer, block, mlp))
    return found


def _block(model: nn.Module, path: str) -> nn.Module:
    """The module around the one at a path; lists of modules are none, since nobody calls them."""
    while path:
        path = path.rpartition(".")[0]
        around = model.get_submodule(path)
        if not isinstance(around, nn.ModuleList | nn.ModuleDict):
            return around
    return model


def chosen(found: list[Leaf], at: str | Any = "*", branch: str | None = None) -> list[Leaf]:
    """Those at these sites.

    Args:
        found: All.
        at: Names of sites, with `*`.
        branch: Name of a branch; None for all.

    Raises:
        ZooError: AZ923, when there is none.
    """
    patterns = [at] if isinstance(at, str) else list(at)
    sites = list(dict.fromkeys(leaf.site for leaf in found))
    for pattern in patterns:
        if not any(fnmatchcase(site, pattern) for site in sites):
            raise ZooError(
                "AZ923",
                f"no site of this model is called `{pattern}`",
                help=did_you_mean(pattern, sites) or f"there are {sites[0]} to {sites[-1]}",
            )
    here = [leaf for leaf in found if any(fnmatchcase(leaf.site, pattern) for pattern in patterns)]
    kept = [leaf for leaf in here if branch in (None, leaf.branch)]
    if not kept:
        names = ", ".join(dict.fromkeys(f"`{leaf.branch}`" for leaf in here))
        raise ZooError("AZ923", f"no branch there is called `{branch}`", help=f"there are {names}")
    return kept


class _Frames(threading.local):
    """What is known of the forward that this thread is in."""

    def __init__(self) -> None:
        self.shared: dict[Any, Any] = {}
        self.blocks: dict[nn.Module, tuple] = {}
        self.sites: dict[nn.Module, dict[str, Any]] = {}
        self.calls: dict[nn.Module, dict[str, Any]] = {}


class _Passing:
    """A hook that lasts as long as a block. Copies and pickles made meanwhile get one that does nothing; taps none.

    Args:
        call: What it does.
    """

    passing = True

    def __init__(self, call: Callable):
        self.call = call

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.call(*args, **named)

    def __reduce__(self) -> tuple:
        return _Passing, (_nothing,)


def _nothing(*_: Any, **__: Any) -> None:
    """What the hooks of a copy do."""


@contextmanager
def attach(model: nn.Module, edits: Mapping[Leaf, Mapping[str, Edit]]) -> Iterator[None]:
    """Let these edits look at, and replace, what passes by while the block runs; the hooks are always removed.

    Args:
        model: It.
        edits: For each leaf, what looks on by kind (`EDITS`).
    """
    frames, depth = _Frames(), 1 + max((leaf.layer for leaf in leaves(model)), default=0)

    def here(leaf: Leaf) -> Here:
        known = frames.sites.get(leaf.outer, {}) | frames.calls.get(leaf.component, {})
        call = frames.blocks.get(leaf.block, (None,))
        if isinstance(leaf.block, Layer) and leaf.outer is not leaf.block.attn and len(call) > 3:
            known["context"] = call[3]  # also where `step` is called, and the mechanism itself is not
        about = leaf.site, leaf.layer, depth, leaf.branch, leaf.mechanism, leaf.heads
        return Here(*about, **known, tokens=call[0], shared=frames.shared)

    def began(*_: Any) -> None:
        frames.shared = {}

    def entered(block: nn.Module) -> Callable:
        reads = [leaf.site for leaf, kinds in edits.items() if leaf.block is block and "input" in kinds]

        def hook(_module: nn.Module, args: tuple) -> None:
            if reads and any(isinstance(part, KVCache) for one in args for part in _parts(one)):
                raise ZooError(
                    "AZ924",
                    f"what `{reads[0]}` reads cannot be edited while a sequence is continued",
                    why="tokens that were read before are kept, and are not read again",
                    help="ask for whole sequences",
                )
            frames.blocks[block] = args

        return hook

    def at_site(outer: nn.Module) -> Callable:
        def hook(_module: nn.Module, args: tuple, named: dict[str, Any]) -> None:
            frames.sites[outer] = {
                "layout": named.get("layout") or Layout((args[0].shape[1],)),
                "mask": named.get("mask", NO_MASK),
                "context": args[1] if len(args) > 1 else named.get("context"),
            }

        return hook

    def called(head: nn.Module) -> Callable:
        def hook(_module: nn.Module, args: tuple, named: dict[str, Any]) -> None:
            q, k, v = args[:3]
            about = {"layout": named["layout"], "mask": named.get("mask", NO_MASK)}
            frames.calls[head] = about | {"q": q, "k": k, "v": v}

        return hook

    def left(known: str, module: nn.Module) -> Callable:
        def hook(*_: Any) -> None:
            getattr(frames, known).pop(module, None)

        return hook

    with ExitStack() as stack:

        def add(register: Callable, hook: Callable, **how: Any) -> None:
            stack.callback(register(_Passing(hook), **how).remove)

        blocks = dict.fromkeys(leaf.block for leaf in edits)
        outers = dict.fromkeys(leaf.outer for leaf in edits)
        add(model.register_forward_pre_hook, began)
        for block in blocks:
            add(block.register_forward_pre_hook, entered(block))
        for outer in outers:
            add(outer.register_forward_pre_hook, at_site(outer), with_kwargs=True)
        for leaf, by_kind in edits.items():
            component = leaf.component
            if isinstance(component, Head):
                add(component.register_forward_pre_hook, called(component), with_kwargs=True)
            for kind, edit in by_kind.items():
                for register, hook in _hooks(leaf, kind, edit, here):
                    add(register, hook)
            if isinstance(component, Head):
                add(component.register_forward_hook, left("calls", component))
        for leaf in edits:
            add(leaf.block.register_forward_hook, left("sites", leaf.outer))
            add(leaf.block.register_forward_hook, left("blocks", leaf.block))
        yield


def _parts(argument: Any) -> tuple:
    return argument if isinstance(argument, tuple) else (argument,)


def _hooks(
    leaf: Leaf, kind: str, edit: Edit, here: Callable[[Leaf], Here]
) -> Iterator[tuple[Callable, Callable]]:
    """The hooks of one edit at one leaf, and what registers each."""

    def after(_module: nn.Module, _args: tuple, out: Tensor) -> Tensor | None:
        return edit(out, here(leaf))

    def before(_module: nn.Module, args: tuple) -> tuple | None:
        changed = edit(args[0], here(leaf))
        return None if changed is None else (changed, *args[1:])

    if kind == "input":
        yield leaf.outer.register_forward_pre_hook, before
    elif kind == "output" and isinstance(leaf.block, Layer):
        # what `step` gives, which is no call of the mechanism, comes by here too
        skip = leaf.block.attn_skip if leaf.outer is leaf.block.attn else leaf.block.cross_skip
        yield skip.register_forward_pre_hook, before
    elif kind in ("scores", "weights"):
        for tap in leaf.taps(kind):
            yield tap.register_forward_hook, after
    else:
        module = {"heads": leaf.component, "output": leaf.outer, "mlp": leaf.mlp, "block": leaf.block}[kind]
        assert module is not None  # `lacks` said so
        yield module.register_forward_hook, after

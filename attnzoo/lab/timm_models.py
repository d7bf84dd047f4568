"""timm's own models, looked into: taps for their attention, without retraining, as long as a block of `with` lasts.

with tapped(timm.create_model("vit_base_patch16_224")) as model: ...

In the place of timm's attention stands `MultiHead` around timm's own projections and parameters, which gives the same
numbers, bit for bit, while nobody watches. So maps, rollout and whatever else works with a mechanism work with timm's.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from timm.layers import Attention, AttentionPoolLatent, AttentionRope
from timm.models import beit, swin_transformer, swin_transformer_v2, vision_transformer_relpos
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import ParallelThingsBlock
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.core import (
    Card,
    Family,
    Head,
    Law,
    Layout,
    Mask,
    Mechanism,
    MultiHead,
    Paper,
    Rotation,
    Site,
)
from attnzoo.errors import ZooError
from attnzoo.functional import attention_from_scores
from attnzoo.hosts.timm_vit import from_timm
from attnzoo.lab.windows import InWindows, Windows
from attnzoo.zoo import load_zoo


@dataclass(frozen=True, eq=False)
class AddedScores(Mask):
    """What timm adds to the scores: it hides softly, or not at all, and so it travels in the place of a mask.

    Args:
        added: Broadcasts to (b h n m); None for nothing.
        temperature: Factor of the cosines of queries and keys, (h 1 1); None for scaled dot products.
    """

    added: Tensor | None = None
    temperature: Tensor | None = None


class BiasedSoftmax(Head):
    """softmax(q kᵀ / √d + B) v, or softmax(τ cos(q, k) + B) v; B and τ come with each forward, as `AddedScores`.

    Args:
        site: Where the head is put.
        fused: Whether PyTorch's fused kernel is used while no tap is watched; never for cosines.
    """

    card = Card(
        name="biased_softmax",
        family=Family.DOT_PRODUCT,
        summary="Softmax attention with positions added to the scores, as timm's models have it.",
        paper=Paper(
            "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
            "Liu et al.",
            2021,
            "arXiv:2103.14030",
            where="§3.2, eq. 4; of cosines: Swin Transformer V2, arXiv:2111.09883, §3.3, eq. 2",
        ),
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC, Law.LINEAR_IN_VALUES, Law.HEADS_APART},
    )

    def __init__(self, site: Site, fused: bool = True):
        super().__init__(site)
        self.fused = fused

    def attend(self, q, k, v, *, mask, layout):
        found = mask if isinstance(mask, AddedScores) else AddedScores()
        if self.fused and found.temperature is None and not (self.scores.watched or self.weights.watched):
            dropout = self.attn_drop if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, attn_mask=found.added, dropout_p=dropout)
        if found.temperature is None:
            scores = (q * q.shape[-1] ** -0.5) @ k.mT
        else:
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * found.temperature
        return attention_from_scores(self, scores if found.added is None else scores + found.added, v, None)


class _Unturned(Rotation):
    """Of a forward without rotary positions, in an attention that can have them."""

    def turn(self, x: Tensor, prefix: int) -> Tensor:
        return x


_UNTURNED = _Unturned(torch.empty(0))


class _Grid(threading.local):
    """Rows and columns of the patches that this thread cut last; copies begin with none."""

    last: tuple[int, ...] | None = None

    def __reduce__(self):
        return type(self), ()


class _Arrangement:
    """How the tokens of a model lie: special tokens, then the grid of the patches that this thread cut last.

    Args:
        model: Any. Where it does not cut an image into one grid of patches, tokens are a line.
    """

    def __init__(self, model: nn.Module):
        owners = (part for part in model.modules() if hasattr(part, "patch_embed"))
        owner: Any = next((part for part in owners if hasattr(part.patch_embed, "dynamic_feat_size")), None)
        self.embed = None if owner is None else owner.patch_embed
        self.prefix = getattr(owner, "num_prefix_tokens", 0)
        self.grid = _Grid()

    def follow(self, stack: ExitStack) -> None:
        """Note the grid of every forward until the stack is left."""
        if self.embed is not None:
            stack.callback(self.embed.register_forward_pre_hook(_Cut(self.grid)).remove)

    def layout(self, tokens: int, prefix: int | None = None) -> Layout:
        """How so many tokens lie; in a line when they are no whole grid, because patches were dropped or merged.

        Args:
            tokens: n.
            prefix: Number of special tokens, where the attention knows.
        """
        special = self.prefix if prefix is None else prefix
        grid = self.grid.last or getattr(self.embed, "grid_size", None)
        if grid and special + math.prod(grid) == tokens:
            return Layout(tuple(grid), special)
        special = special if special < tokens else 0
        return Layout((tokens - special,), special)


@dataclass(frozen=True)
class _Cut:
    """A hook that notes how an image is cut into patches."""

    grid: _Grid

    def __call__(self, embed: Any, args: tuple) -> None:
        self.grid.last = tuple(embed.dynamic_feat_size(tuple(args[0].shape[-2:])))


class _Parted(threading.local):
    """The grid that a block of this thread cut into windows last, and their shift; copies begin with none."""

    last: tuple[tuple[int, int], tuple[int, int]] | None = None

    def __reduce__(self):
        return type(self), ()


@dataclass(frozen=True)
class _Partition:
    """A hook before a block that notes how it will cut its tokens (b y x c) into windows for its attention."""

    parted: _Parted

    def __call__(self, block: Any, args: tuple) -> None:
        self.parted.last = (tuple(args[0].shape[1:3]), tuple(block.shift_size)) if args else None

    def layout(self, windows: int, size: tuple[int, int]) -> InWindows:
        """How the tokens of a window lie.

        Args:
            windows: Of all images.
            size: Rows and columns of a window.
        """
        if self.parted.last is None:
            return InWindows(size)
        grid, shift = self.parted.last
        cut = Windows(grid, size, shift)
        return InWindows(size, windows=None if windows % cut.count else cut)


Call = tuple[Mask, Layout]
"""What a mechanism is told beside its tokens."""
Reading = Callable[..., Call]
"""Reads a call of timm's: the mechanism, the arrangement or partition, then timm's own arguments."""


def _plain(
    mech: Any, lie: _Arrangement, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Call:
    return _mask(x, attn_mask, is_causal), lie.layout(x.shape[1])


def _rotary(
    mech: Any,
    lie: _Arrangement,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Call:
    rotation = _UNTURNED if rope is None else Rotation(rope, mech.rotate_half)
    layout = replace(lie.layout(x.shape[1], mech.num_prefix_tokens), rotation=rotation)
    return _mask(x, attn_mask, is_causal), layout


def _mask(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Mask:
    """timm's mask, which PyTorch stretches to (b h n m); (n m) and (h n m) are short forms."""
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)].expand(-1, -1, x.shape[1], x.shape[1])
    return from_timm(attn_mask, is_causal)


def _swin(mech: Any, lie: _Partition, x: Tensor, mask: Tensor | None = None) -> Call:
    added = _beside(_table(mech), mask, x.shape[0])
    return AddedScores(added=added), lie.layout(x.shape[0], tuple(mech.window_size))


def _swin_v2(mech: Any, lie: _Partition, x: Tensor, mask: Tensor | None = None) -> Call:
    table = mech.cpb_mlp(mech.relative_coords_table).view(-1, mech.heads)  # continuous positions, eq. 3
    bias = 16 * torch.sigmoid(table[mech.relative_position_index].permute(2, 0, 1).contiguous())[None]
    added, temperature = _beside(bias, mask, x.shape[0]), mech.logit_scale.clamp(max=math.log(100.0)).exp()
    layout = lie.layout(x.shape[0], tuple(mech.window_size))
    return AddedScores(added=added, temperature=temperature), layout


def _beit(mech: Any, lie: _Arrangement, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Call:
    own = None if mech.relative_position_bias_table is None else _table(mech)
    parts = [part for part in (own, shared_rel_pos_bias) if part is not None]
    return AddedScores(added=sum(parts[1:], parts[0]) if parts else None), lie.layout(x.shape[1])


def _relpos(mech: Any, lie: _Arrangement, x: Tensor, shared_rel_pos: Tensor | None = None) -> Call:
    added = shared_rel_pos if mech.rel_pos is None else mech.rel_pos.get_bias()
    return AddedScores(added=added), lie.layout(x.shape[1])


def _table(mech: Any) -> Tensor:
    """The learnt number of each head for each relative position, (1 h n n)."""
    bias = mech.relative_position_bias_table[mech.relative_position_index]
    return bias.permute(2, 0, 1).contiguous()[None]


def _beside(bias: Tensor, mask: Tensor | None, windows: int) -> Tensor:
    """Positions, and what the windows of one image hide because they were shifted, (b·w h n n).

    Args:
        bias: (1 h n n).
        mask: 0 or -100, for each window of an image, (w n n).
        windows: Of all images, b·w.
    """
    return bias if mask is None else bias + mask.repeat(windows // mask.shape[0], 1, 1)[:, None]


@dataclass(frozen=True)
class _Kind:
    """How a class of timm's is understood.

    Args:
        read: Reads a call of its forward.
        biased: Whether something is added to the scores.
        windows: Whether the block around it cuts a grid into windows.
    """

    read: Reading
    biased: bool = False
    windows: bool = False


KINDS: Mapping[type, _Kind] = {
    Attention: _Kind(_plain),
    AttentionRope: _Kind(_rotary),
    EvaAttention: _Kind(_rotary),
    beit.Attention: _Kind(_beit, biased=True),
    vision_transformer_relpos.RelPosAttention: _Kind(_relpos, biased=True),
    swin_transformer.WindowAttention: _Kind(_swin, biased=True, windows=True),
    swin_transformer_v2.WindowAttention: _Kind(_swin_v2, biased=True, windows=True),
}
"""timm's classes of attention that can have taps."""
BLOCKS_OF_WINDOWS = {swin_transformer.SwinTransformerBlock, swin_transformer_v2.SwinTransformerV2Block}
"""timm's blocks of which it is known how they cut a grid into windows."""

_AT_ONCE = "which projects for attention and MLP at once, so that no attention is there by itself"
_CHANNELS = "where channels look at channels, and no token at another"
_MERGED = "where tokens look at others that were merged first"
_REASONS: Mapping[str, str] = {
    "DiffAttention": "whose weights are the difference of two softmaxes, neither of which is what a head looks at",
    "ParallelScalingBlock": _AT_ONCE,
    "DiffParallelScalingBlock": _AT_ONCE,
    "XCA": _CHANNELS,
    "ChannelAttention": _CHANNELS,
    "ChannelAttentionV2": _CHANNELS,
    "CrossCovarianceAttn": _CHANNELS,
    "TalkingHeadAttn": "which mixes the heads' weights, so that weights times values is not what a head gives",
    "GlobalSubSampleAttn": _MERGED,
    "MultiScaleAttention": _MERGED,
    "LinearSelfAttention": "which forms no weights between tokens",
    "EfficientAdditiveAttention": "which forms no weights between tokens",
}
"""Why classes of timm's have none, by their names."""
_GATED = "whose gate multiplies what the heads give, so that weights times values is not what a head gives"
_OTHERS = "which is called or computes in a way of its own, for which nobody has written taps"


@dataclass(frozen=True)
class _AsTimmCalls:
    """A hook before a mechanism that is called as timm calls its attention."""

    read: Reading
    lie: _Arrangement | _Partition

    def __call__(self, mech: nn.Module, args: tuple, said: dict[str, Any]) -> tuple | None:
        if "layout" in said:  # somebody who knows what it is
            return None
        mask, layout = self.read(mech, self.lie, *args, **said)
        return (args[0] if args else said["x"],), {"mask": mask, "layout": layout}


@contextmanager
def tapped(model: nn.Module) -> Iterator[nn.Module]:
    """Taps for the attention of a timm model as long as the block lasts; the very same parameters, nothing is copied.

    The model is changed in place and left as it was, after exceptions too. What is done to it meanwhile stays: another
    device or dtype, loaded weights, other projections, the mode of training. A copy made meanwhile keeps the taps. In
    models that have mechanisms, attnzoo's own or inside another such block, nothing happens. While one thread looks
    into a model, others may call it, but not look into the same one.

    Args:
        model: With attention of one of `KINDS`.

    Yields:
        The model.

    Raises:
        ZooError: AZ903, when no attention of it can have taps, or only some.
        UnsupportedMask: AZ405, from a forward inside with a mask of other numbers than 0 and -inf.
    """
    with ExitStack() as stack:
        if not any(isinstance(part, Mechanism) for part in model.modules()):
            if reason := why_not(model):
                raise untapped(model, reason)
            _tap(model, stack)
        yield model


def untapped(model: nn.Module, reason: str) -> ZooError:
    """The refusal of a model without taps.

    Args:
        model: It.
        reason: From `why_not`; empty where it only has none yet.
    """
    name = type(model).__name__
    if not reason:
        return ZooError(
            "AZ903",
            f"there is no mechanism in this {name}",
            why="maps are seen through the taps of mechanisms",
            help="look inside a block `with attnzoo.lab.timm_models.tapped(model)`",
        )
    return ZooError(
        "AZ903",
        f"no attention of this {name} can be looked into",
        why=reason,
        help="choose a ViT, such as vit_base_patch16_224, or compose the model from a recipe, such as `ham_classic`",
    )


def why_not(model: nn.Module) -> str:
    """Why the attention of a model cannot have taps, with its classes; empty where it can.

    Args:
        model: Without mechanisms.
    """
    faults: dict[str, str] = {}
    found = False
    for part in model.modules():
        kind = type(part)
        if kind in KINDS:
            found = True
            if getattr(part, "gate", None) is not None:
                faults[kind.__name__] = _GATED
        elif kind is not AttentionPoolLatent and (isinstance(part, tuple(KINDS)) or _named_so(kind.__name__)):
            faults[kind.__name__] = _REASONS.get(kind.__name__, _OTHERS)
    if faults:
        return "it has " + "; and ".join(f"{name}, {reason}" for name, reason in faults.items())
    return "" if found else "no class of its modules is called an attention"


def _named_so(name: str) -> bool:
    """Whether a class is called an attention."""
    return name in _REASONS or "Attention" in name or name.endswith("Attn")


def _tap(model: nn.Module, stack: ExitStack) -> None:
    """Put mechanisms in the place of timm's attention, until the stack is left."""
    lie = _Arrangement(model)
    places = [
        (parent, name, f"{path}.{name}" if path else name)
        for path, parent in model.named_modules(remove_duplicate=False)
        for name, child in parent.named_children()
        if type(child) in KINDS
    ]
    mechanisms: dict[nn.Module, MultiHead] = {}
    softmax = cast(type[Head], load_zoo().mechanisms["attnzoo/softmax"].value)
    with torch.device("meta"):  # what it has of its own is never used
        for i, (parent, name, path) in enumerate(places):
            donor = parent.get_submodule(name)
            if donor in mechanisms:
                continue
            about: _Arrangement | _Partition = lie
            if KINDS[type(donor)].windows:
                about = _Partition(_Parted())
                if type(parent) in BLOCKS_OF_WINDOWS:
                    stack.callback(parent.register_forward_pre_hook(about).remove)
            site = path.rpartition(".")[0] or path
            mechanisms[donor] = _around(donor, softmax, site, i, len(places), about)
    lie.follow(stack)
    for donor, mech in mechanisms.items():
        stack.callback(_give_back, donor, mech, _lend(donor, mech), donor.training)
    for parent, name, _ in places:
        donor = parent.get_submodule(name)
        if isinstance(donor, MultiHead):
            continue  # the same parent, met by another name
        stack.callback(_put_back, parent, name, donor, mechanisms[donor])
        setattr(parent, name, mechanisms[donor])


def _around(
    donor: Any, softmax: type[Head], name: str, layer: int, depth: int, lie: _Arrangement | _Partition
) -> MultiHead:
    """A mechanism as timm's attention is, with projections that are still to be lent."""
    kind = KINDS[type(donor)]
    heads, each = donor.num_heads, getattr(donor, "head_dim", None)
    site = Site(
        name=name,
        dim=heads * each
        if each
        else donor.proj.in_features,  # of all heads, which need not be that of the tokens
        heads=heads,
        layout=Layout((1,)),
        layer=layer,
        depth=depth,
        attn_drop=donor.attn_drop.p,
        qkv_fused=getattr(donor, "qkv", None) is not None,
        kv_heads=getattr(donor, "num_kv_heads", None),
        rotary=kind.read is _rotary,
    )
    if kind.biased:
        head: Head = BiasedSoftmax(site, fused=getattr(donor, "fused_attn", False))
    else:
        head = softmax(site)
        if not donor.fused_attn:  # a tap that is watched keeps the explicit form
            head.weights.register_forward_hook(_look_away)
    mech = MultiHead(site, head).train(donor.training)
    mech._forward_pre_hooks.update(donor._forward_pre_hooks)  # they see what timm hands over
    mech._forward_pre_hooks_with_kwargs.update(donor._forward_pre_hooks_with_kwargs)
    mech.register_forward_pre_hook(_AsTimmCalls(kind.read, lie), with_kwargs=True)
    for name, value in vars(donor).items():
        if not hasattr(mech, name):  # what others may ask timm's attention for: `num_heads`, `scale`, ...
            setattr(mech, name, value)
    return mech


def _look_away(_tap: nn.Module, _args: tuple, _out: Tensor) -> None:
    """A hook that only makes a tap watched."""


_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def _lend(donor: nn.Module, mech: nn.Module) -> tuple[str, ...]:
    """Let a mechanism have the submodules, parameters, buffers and hooks of timm's attention; names of the first three.

    They come in timm's order, because optimisers count parameters.
    """
    passing = {name for name, _ in donor.named_buffers(recurse=False)} - donor.state_dict().keys()
    # of its dropout of weights the mechanism has the number, in a tap
    children = [name for name, _ in donor.named_children() if name != "attn_drop"]
    for name in (*children, *donor._parameters):
        if hasattr(mech, name):
            delattr(mech, name)
    for name in children:
        mech.add_module(name, donor.get_submodule(name))
    for name, parameter in donor._parameters.items():
        mech.register_parameter(name, parameter)
    for name, buffer in donor._buffers.items():
        mech.register_buffer(name, buffer, persistent=name not in passing)
    for name in _HOOKS:
        vars(mech)[name] = vars(donor)[name]
    return (*children, *donor._parameters, *donor._buffers)


def _give_back(donor: Any, mech: nn.Module, lent: tuple[str, ...], training: bool) -> None:
    """Let timm's attention have what the mechanism had, as it is now, and be in the same mode."""
    for name in lent:
        setattr(donor, name, getattr(mech, name))
    if mech.training != training:
        donor.training = donor.attn_drop.training = mech.training


def _put_back(parent: nn.Module, name: str, donor: nn.Module, mech: nn.Module) -> None:
    """Undo the replacement, unless somebody put something else there meanwhile."""
    if getattr(parent, name) is mech:
        setattr(parent, name, donor)


def is_timms(mechanism: nn.Module) -> bool:
    """Whether a mechanism stands in the place of timm's attention."""
    return any(isinstance(hook, _AsTimmCalls) for hook in mechanism._forward_pre_hooks.values())


def pool_weights(pool: AttentionPoolLatent, tokens: Tensor) -> Tensor:
    """How timm's attention pool weighs the tokens, (b h r n), for each of its r latents.

    Args:
        pool: At the end of a model, such as SigLIP's.
        tokens: What it is given, (b n c).
    """
    b, d = tokens.shape[0], pool.head_dim
    if pool.pos_embed is not None:
        tokens = tokens + pool.pos_embed.to(tokens.dtype)
    q = pool.q_norm(pool.q(pool.latent.expand(b, -1, -1)).unflatten(-1, (-1, d)).transpose(1, 2))
    k = pool.k_norm(pool.kv(tokens).unflatten(-1, (2, -1, d))[:, :, 0].transpose(1, 2))
    return (q * d**-0.5 @ k.mT).softmax(dim=-1)


def side_by_side(model: nn.Module) -> bool:
    """Whether blocks have several attentions side by side, so that a site is no layer."""
    return any(isinstance(part, ParallelThingsBlock) for part in model.modules())

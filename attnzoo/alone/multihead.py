"""A mechanism in the clothes of `nn.MultiheadAttention`, for networks that were written for it."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnzoo.alone import masks
from attnzoo.alone.build import component_for
from attnzoo.alone.modules import admit
from attnzoo.core import Layout, Mask, Mechanism, Pool, find_taps, watch
from attnzoo.errors import UnsupportedArgument, UnsupportedMask


def as_mha(
    mechanism: str | Mapping[str, Any],
    embed_dim: int,
    num_heads: int,
    dropout: float = 0.0,
    bias: bool = True,
    add_bias_kv: bool = False,
    add_zero_attn: bool = False,
    kdim: int | None = None,
    vdim: int | None = None,
    batch_first: bool = False,
    device: Any = None,
    dtype: torch.dtype | None = None,
    *,
    cross: bool = False,
    grid: int | Sequence[int] | None = None,
    prefix: int | None = None,
    **options: Any,
) -> "MultiheadAttention":
    """A mechanism with the arguments, the masks and the results of `nn.MultiheadAttention`.

        layer = nn.TransformerEncoderLayer(512, 8, batch_first=True)
        layer.self_attn = attnzoo.as_mha("softmax", 512, 8, batch_first=True)

    Masks mean what they mean there: True hides. A row with nothing to attend to gives zeros, not NaN. Weights start as
    PyTorch's Linear layers do; `load_state_dict` takes those of an `nn.MultiheadAttention` too, where the mechanism
    projects queries, keys and values as it does.

    Args:
        mechanism: As for `create`.
        embed_dim: Width of the tokens, in channels.
        num_heads: Number of heads.
        dropout: Of attention weights, a probability.
        bias: Whether projections have biases.
        add_bias_kv, add_zero_attn: Only False: keys that are no tokens.
        kdim, vdim: Width of keys and values, which are one context; another one than `embed_dim` implies `cross`.
        batch_first: Whether tokens are (batch, sequence, channels), or (sequence, batch, channels).
        device: Where weights are made.
        dtype: Of the weights.
        cross: Whether keys and values are a context, or the queries themselves.
        grid: Tokens along each dimension, of what queries are; a line of any length unless said.
        prefix: Number of special tokens in front of the grid.
        options: The component's own, and what else `create` takes.

    Raises:
        UnsupportedArgument: AZ411, for `add_bias_kv`, `add_zero_attn`, `vdim` that is not `kdim`, a pool, maps.
        ZooError: As for `create`.
    """
    for name, asked in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
        if asked:
            raise _unsupported(
                f"`{name}` adds a key that is no token", "leave it out, or use nn.MultiheadAttention"
            )
    kdim, vdim = kdim or embed_dim, vdim or embed_dim
    if kdim != vdim:
        raise _unsupported(
            f"keys of {kdim} channels and values of {vdim} cannot come from one context",
            "hand the same tokens as key and value, and give `kdim` and `vdim` their width",
        )
    place = {name: options.pop(name) for name in _ELSEWHERE if options.get(name) is not None}
    place |= {"dim": embed_dim, "heads": num_heads}
    place |= {"attn_drop": dropout} if dropout else {}
    place |= {} if bias else {"qkv_bias": False, "proj_bias": False}
    place |= {"context_dim": kdim} if cross or kdim != embed_dim else {}
    place |= {} if grid is None else {"grid": grid}
    place |= {} if prefix is None else {"prefix": prefix}
    part = component_for(mechanism, options, place, device=device, dtype=dtype)
    component = part.component
    if isinstance(component, Pool) or component.card.given:
        what = "gives one token" if isinstance(component, Pool) else "needs maps that are handed over"
        raise _unsupported(f"`{part.formula}` {what}", "attnzoo.create takes it")
    return MultiheadAttention(
        component, part.formula, embed_dim, num_heads, dropout, kdim, batch_first, part.layout, part.prefix
    )


_ELSEWHERE = ("context_grid", "proj_drop", "qk_norm", "scale_norm", "rotary", "norm_layer", "layer", "depth")
"""What `create` is told of the place and `nn.MultiheadAttention` has no word for."""


class MultiheadAttention(nn.Module):
    """What `as_mha` gives. Its weights are those of `attn`.

    Args:
        attn: The mechanism.
        formula: What it is, for people.
        embed_dim, num_heads, dropout, kdim, batch_first: As for `as_mha`.
        layout: How queries lie; None for a line of any length.
        prefix: Number of special tokens in front of such a line.
    """

    _qkv_same_embed_dim = False
    """PyTorch's encoder layers ask, before they would compute the attention themselves in eval mode."""

    def __init__(
        self,
        attn: Mechanism,
        formula: str,
        embed_dim: int,
        num_heads: int,
        dropout: float,
        kdim: int,
        batch_first: bool,
        layout: Layout | None,
        prefix: int,
    ):
        super().__init__()
        self.attn, self.formula, self.layout, self.prefix = attn, formula, layout, prefix
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim = self.vdim = kdim
        self.dropout, self.batch_first = dropout, batch_first
        taps = find_taps(attn, "weights")
        self.forms_weights = [tap.axes for tap in taps.values()] == ["b h n m"]
        self.register_load_state_dict_pre_hook(_from_pytorch)

    @property
    def in_proj_weight(self) -> "_NoFastPath":
        """None of PyTorch's: a stack of encoder layers asks for it, and must not take its own path."""
        return _NoFastPath()

    in_proj_bias = in_proj_weight

    @property
    def out_proj(self) -> "_NoFastPath":
        """As `in_proj_weight`."""
        return _NoFastPath()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What each query receives, and the weights (b n m), or (b h n m), or None.

        Args:
            query: (n b c), (b n c) with `batch_first`, or (n c).
            key: The query itself; with `cross` (m b e), (b m e) or (m e).
            value: The key itself.
            key_padding_mask: (b m) or (m), True or -inf for keys that do not exist.
            need_weights: Whether weights are wanted; they are those before dropout.
            attn_mask: (n m) or (b*h n m), True or -inf for pairs that are hidden.
            average_attn_weights: Whether weights are averaged over the heads.
            is_causal: A promise that `attn_mask` hides later keys and nothing else.

        Raises:
            UnsupportedArgument: AZ411, when keys are not queries though it was made so, values are not keys, or weights
                are wanted that are not formed.
            UnsupportedMask: AZ402 a mask that the mechanism cannot honour, AZ405 one that is none, or adds other values
                than 0 and -inf.
            LayoutMismatch: AZ401 tokens that do not fit.
        """
        self._same(query, key, value, need_weights)
        traced = isinstance(query, fx.Proxy)
        if traced and not (key_padding_mask is attn_mask is None and is_causal is False):
            query = masks.bare(query, key_padding_mask, attn_mask, is_causal)
            key_padding_mask, attn_mask, is_causal = None, None, False
        if not traced and query.is_nested:
            return self._nested(query, key, key_padding_mask, attn_mask), None
        batched = traced or query.ndim == 3
        x, context = (self._batch_first(t, batched) for t in (query, key))
        admit(self.formula, x, "queries", self.embed_dim, 3)
        admit(self.formula, context, "keys", self.kdim, 3, beside=x)
        mask = self._mask(x, context, key_padding_mask, attn_mask, is_causal) if not traced else Mask()
        cross = self.attn.context_dim is not None
        layout = self.layout or Layout((x.shape[1] - self.prefix,), self.prefix)
        if not traced:
            layout.check(x)
        run = self._seen if need_weights else self._unseen
        out, weights = run(x, context if cross else None, mask, layout)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return out[0], None if weights is None else weights[0]
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _unseen(self, x: Tensor, context: Tensor | None, mask: Mask, layout: Layout) -> tuple[Tensor, None]:
        return self.attn(x, context, mask=mask, layout=layout), None

    @torch.compiler.disable
    def _seen(self, x: Tensor, context: Tensor | None, mask: Mask, layout: Layout) -> tuple[Tensor, Tensor]:
        """The result and the weights (b h n m), seen through the tap."""
        seen, me = list[Tensor](), threading.get_ident()

        def keep(_name: str, weights: Tensor) -> None:
            if threading.get_ident() == me:  # other threads may use the same module
                seen.append(weights)

        with watch(self.attn, "weights", keep):
            return self.attn(x, context, mask=mask, layout=layout), seen[-1]

    def _same(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool) -> None:
        if value is not key:
            raise _unsupported(
                f"`{self.formula}` reads keys and values from the same tokens; value is not key",
                "hand one tensor as key and value",
            )
        if key is not query and self.attn.context_dim is None:
            raise _unsupported(
                f"`{self.formula}` was made for self-attention; key is not query",
                "make it with cross=True, or hand one tensor as query, key and value",
            )
        if need_weights and not self.forms_weights:
            raise _unsupported(
                f"`{self.formula}` forms no weights of queries over keys",
                "hand need_weights=False; attnzoo.watch shows what else there is to see",
            )

    def _batch_first(self, tokens: Tensor, batched: bool) -> Tensor:
        """Tokens as (b n c)."""
        if not batched:
            return tokens[None]
        return tokens if self.batch_first else tokens.transpose(0, 1)

    def _mask(
        self, x: Tensor, context: Tensor, padding: Tensor | None, pairs: Tensor | None, is_causal: bool
    ) -> Mask:
        """PyTorch's masks as ours."""
        (b, n, _), m, claimed = x.shape, context.shape[1], self.attn.card.masks
        keys = None if padding is None else _allowed(padding, "key_padding_mask")
        if keys is not None and keys.ndim == 1:
            keys = keys[None]
        if is_causal and n == m and (pairs is None or "causal" in claimed):
            return Mask(keys=keys, causal=True)
        if pairs is None:
            if is_causal:
                raise UnsupportedMask(
                    "AZ405",
                    f"`is_causal` with {n} queries and {m} keys does not say which of them belong together",
                    help="hand the whole mask as `attn_mask`",
                )
            return Mask(keys=keys)
        allowed = _allowed(pairs, "attn_mask")
        if allowed.ndim == 3:
            if allowed.shape[0] != b * self.num_heads:
                raise UnsupportedMask(
                    "AZ405",
                    f"`attn_mask` has shape {tuple(allowed.shape)}; {b} samples with {self.num_heads} heads want "
                    f"({n}, {m}) or ({b * self.num_heads}, {n}, {m})",
                )
            return Mask(keys=keys, pairs=allowed.unflatten(0, (b, self.num_heads)))
        if (
            allowed.ndim == 2
            and n == m
            and "pairs" not in claimed
            and "causal" in claimed
            and _is_causal(allowed)
        ):
            return Mask(keys=keys, causal=True)
        return Mask(keys=keys, pairs=allowed.reshape((1, 1, *allowed.shape)))

    def _nested(self, x: Tensor, key: Tensor, padding: Tensor | None, pairs: Tensor | None) -> Tensor:
        """Samples of several lengths, as a stack of encoder layers hands them on in eval mode."""
        if padding is not None or pairs is not None or key is not x:
            raise _unsupported(
                "nested tensors come without masks and without a context", "hand padded tokens"
            )
        lengths = torch.tensor([sample.shape[0] for sample in x.unbind()], device=x.device)
        tokens = x.to_padded_tensor(0.0)
        keys = torch.arange(tokens.shape[1], device=x.device) < lengths[:, None]
        out, _ = self(*[self._batch_first(tokens, True)] * 3, key_padding_mask=~keys, need_weights=False)
        return torch._nested_tensor_from_mask(self._batch_first(out, True), keys, mask_check=False)

    @property
    def takes(self) -> str:
        """What goes in, in words."""
        return f"queries, keys and values ({'b n' if self.batch_first else 'n b'} {self.embed_dim})"

    def extra_repr(self) -> str:
        context = f", context={self.kdim}" if self.attn.context_dim is not None else ""
        return f"{self.formula}, embed_dim={self.embed_dim}, num_heads={self.num_heads}{context}"


def _from_pytorch(module: nn.Module, state: dict[str, Tensor], prefix: str, *_rest: Any) -> None:
    """Give what a state dict has under the names of `nn.MultiheadAttention` those of the mechanism.

    Rows of `in_proj` are queries, keys, values, as those of `qkv` are. Where a mechanism has neither `qkv` nor `q` and
    `kv`, names stay, and PyTorch says that nobody expects them.
    """
    attn = module.attn
    for kind in ("weight", "bias"):
        apart = [f"{prefix}{role}_proj_{kind}" for role in "qkv"]
        if all(name in state for name in apart):  # keys of another width
            rows = [state[name] for name in apart]
        elif f"{prefix}in_proj_{kind}" in state:
            apart = [f"{prefix}in_proj_{kind}"]
            rows = list(state[apart[0]].chunk(3))
        else:
            continue
        if hasattr(attn, "qkv"):
            state[f"{prefix}attn.qkv.{kind}"] = torch.cat(rows)
        elif hasattr(attn, "q") and hasattr(attn, "kv"):
            state[f"{prefix}attn.q.{kind}"], state[f"{prefix}attn.kv.{kind}"] = rows[0], torch.cat(rows[1:])
        else:
            continue
        for name in apart:
            del state[name]
    for kind in ("weight", "bias"):
        if f"{prefix}out_proj.{kind}" in state and hasattr(attn, "proj"):
            state[f"{prefix}attn.proj.{kind}"] = state.pop(f"{prefix}out_proj.{kind}")


class _NoFastPath:
    """Stands where PyTorch looks for a weight: with it, `has_torch_function` keeps PyTorch from a path of its own."""

    @property
    def weight(self) -> "_NoFastPath":
        """As that of a Linear."""
        return self

    bias = weight

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


def _allowed(mask: Tensor, name: str) -> Tensor:
    """PyTorch's mask, in which True or -inf hides, as one in which True allows."""
    if mask.dtype == torch.bool:
        return ~mask
    if not mask.is_floating_point():
        raise UnsupportedMask("AZ405", f"`{name}` is boolean or floating point, not {mask.dtype}")
    allowed = mask == 0
    plain = (allowed | (mask == float("-inf"))).all()
    why = "a bias on the scores is part of a mechanism, not of a mask"
    if torch.compiler.is_compiling():  # a question that a graph cannot ask is asked when it runs
        torch._assert_async(plain, f"`{name}` holds values other than 0 and -inf: {why}")
    elif not bool(plain):
        raise UnsupportedMask(
            "AZ405",
            f"`{name}` holds values other than 0 and -inf",
            why=why,
            help="hand a boolean mask in which True hides",
        )
    return allowed


def _is_causal(allowed: Tensor) -> bool:
    return torch.equal(allowed, torch.ones_like(allowed).tril())


def _unsupported(text: str, help: str) -> UnsupportedArgument:
    return UnsupportedArgument("AZ411", text, why="it would be ignored without a word otherwise", help=help)

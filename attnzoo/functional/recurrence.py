"""A state that is carried along a sequence: what of it decays, what is written into it, what is read.

By chunks of w tokens, exactly. Decays are logarithms and only ever summed, from one token to a later one, and never
subtracted: no exponent is above 0, and none loses digits, however long the sequence and however strong the decay.
"""

import math
from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.core import Card, KVCache, Layout, Mask, Mechanism

CHUNK = 64
CARRIED = f"(1 + (direction == 'both')) * ceil(n / (w := min({CHUNK}, 2 ** (n - 1).bit_length()))) * w"
"""In formulas: the tokens of all directions, with those that fill up chunks of w."""


class Recurrent(Mechanism):
    """What mechanisms with a state have in common: `read` tokens, `carry` a state along them, `write` what it gives.

    They have an option `direction`: `forward`, from the first token to the last, whatever the mask; or `both`, which
    adds what is carried from the last token to the first, and honours no causal mask.
    """

    direction: str

    @classmethod
    def claims(cls, *_, direction: str, **options) -> Card:
        return cls.card if direction == "forward" else replace(cls.card, masks={"keys"}, incremental=False)

    @abstractmethod
    def read(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each token (b n c) says by itself, (b n ...) each."""

    @abstractmethod
    def carry(
        self, read: tuple[Tensor, ...], there: Tensor | None, past: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, ...]:
        """What heads recall, (b h n e), and the state after the last token: tensors (b ...) of constant size.

        Args:
            read: What `read` gave.
            there: Which tokens exist, (b n); None when all do.
            past: The state before the first token; empty where there is none.
        """

    @abstractmethod
    def write(self, x: Tensor, heads: Tensor) -> Tensor:
        """What tokens (b n c) get of what heads recall (b h n e)."""

    def mix(self, x, source, *, mask, layout):
        read = self.read(x)
        heads = self.carry(read, mask.keys)[0]
        if self.direction == "both":
            there = None if mask.keys is None else mask.keys.flip(1)
            heads = heads + self.carry(tuple(t.flip(1) for t in read), there)[0].flip(2)
        return self.write(x, heads)

    def step(
        self,
        x: Tensor,
        cache: KVCache,
        context: Tensor | None = None,
        *,
        mask: Mask,
        layout: Layout,
        context_layout: Layout | None = None,
    ) -> Tensor:
        if self.direction == "both" or context is not None:
            return super().step(x, cache, context, mask=mask, layout=layout, context_layout=context_layout)
        keys = mask.only(*self.card.masks, by=self.card.name).keys
        there = None if keys is None else keys[:, -x.shape[1] :]
        heads, *state = self.carry(self.read(x), there, cache.carried)
        cache.carry(x.shape[1], *state)
        return self.proj_drop(self.write(x, heads))


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    rate: Tensor | None = None,
    there: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = S_tᵀ q_t of the states S_t = diag(α_t) S_{t-1} + k_t u_tᵀ, and the last state.

    u_t = v_t or, by the delta rule, β_t (v_t - (diag(α_t) S_{t-1})ᵀ k_t). The cost is n (w + d) (d + e); one state is
    held at a time. One token alone is a step of the recurrence.

    Args:
        q, k: What asks and where it is written, (b h n d) each; h may be 1.
        v: What is written, (b h n e).
        decay: log α, 0 at most, that broadcasts to (b h n d), or to (b h n 1) where all channels decay alike.
        rate: β, that broadcasts to (b h n 1); None where what is recalled has no say.
        there: Which tokens exist, (b n); the others are neither written nor does the state decay. None when all do.
        state: S before the first token, (b h d e); zero when None.

    Returns:
        (b h n e), in the dtype of v, and (b h d e). Half precisions are computed in float32.
    """
    dtype, exact = v.dtype, torch.promote_types(v.dtype, torch.float32)
    q, k, v, decay = (t.to(exact) for t in (q, k, v, decay))
    b, h, n, e = v.shape
    decay = decay.expand(b, h, n, decay.shape[-1])
    rate = None if rate is None else rate.to(exact).expand(b, h, n, 1)
    if there is not None:
        absent = ~there[:, None, :, None]
        k, v, decay = (t.masked_fill(absent, 0.0) for t in (k, v, decay))
        rate = None if rate is None else rate.masked_fill(absent, 0.0)
    w = 1
    while w < min(n, CHUNK):
        w *= 2
    q, k, v, decay = (_chunks(t, w) for t in (q, k, v, decay))  # (b h r w d), r chunks
    since, left = _since(decay).exp(), _until(decay).exp()
    asks, keys, last = q * since, k * left, since[..., -1:, :].mT
    scores = _products(q, k, decay)
    if rate is None:
        wrote, recall = v, None
    else:  # the errors of a chunk solve (I + β tril(k kᵀ)) u = β (v - what the state before it recalls)
        rate = _chunks(rate, w)
        solve = _inverse((rate * _products(k, k, decay)).tril(-1))
        wrote, recall = solve @ (rate * v), solve @ (rate * k * since)
    if state is None:
        state = v.new_zeros(b, h, q.shape[-1], e)
    state, out = state.to(exact), []
    for i in range(v.shape[2]):
        new = wrote[:, :, i] if recall is None else wrote[:, :, i] - recall[:, :, i] @ state
        out.append(scores[:, :, i] @ new + asks[:, :, i] @ state)
        state = last[:, :, i] * state + keys[:, :, i].mT @ new
    return torch.cat(out, dim=2)[:, :, :n].to(dtype), state


def short_conv(
    x: Tensor, weight: Tensor, there: Tensor | None = None, past: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each channel's weighted sum of a token and the w - 1 before it, and the newest w - 1 tokens.

    Args:
        x: (b n c).
        weight: (c w), that of the token itself last.
        there: Which tokens exist, (b n); the others are not among those before another. None when all do.
        past: The w - 1 tokens before the first, (b w-1 c); zero when None.

    Returns:
        (b n c) and (b w-1 c).
    """
    (b, n, c), w = x.shape, weight.shape[1]
    past = x.new_zeros(b, w - 1, c) if past is None else past.to(x.dtype)
    line = torch.cat([past, x], dim=1)
    if there is None:
        return F.conv1d(line.mT, weight[:, None], groups=c).mT, line[:, n:]
    exists = torch.cat([there.new_ones(b, w - 1), there], dim=1)
    at = torch.arange(n + w - 1, device=x.device).expand(b, -1)
    seen = torch.where(exists, at, 0).cummax(dim=1).values  # the newest that exists so far
    before = F.pad(seen[:, :-1], (1, 0))  # and without the token itself
    place, newest = at[:, w - 1 :], seen[:, -1:]
    out, kept = line[:, w - 1 :] * weight[:, -1], []
    for i in range(1, w):
        place = before.gather(1, place)
        out = out + line.gather(1, place[..., None].expand(b, n, c)) * weight[:, -1 - i]
        kept.append(line.gather(1, newest[..., None].expand(b, 1, c)))
        newest = before.gather(1, newest)
    return out, torch.cat([line[:, :0], *kept[::-1]], dim=1)


def unit(t: Tensor) -> Tensor:
    """t / √(|t|² + 10⁻⁶), over the last axis: of length 1, and smooth at zero."""
    exact = t.to(torch.promote_types(t.dtype, torch.float32))
    return (exact * (exact.square().sum(dim=-1, keepdim=True) + 1e-6).rsqrt()).to(t.dtype)


@torch.no_grad()
def init_fading(rates: Tensor, steps: Tensor, least: float) -> None:
    """As Mamba-2's: log A, A uniform up to 16; and softplus⁻¹(Δ), Δ from 0.001 to 0.1, uniform in its logarithm.

    Args:
        rates: Becomes log A, (h).
        steps: Becomes softplus⁻¹(Δ), (h).
        least: The least A.
    """
    rates.uniform_(least, 16.0).clamp_(min=1e-4).log_()
    steps.uniform_(math.log(1e-3), math.log(0.1)).exp_()
    steps.add_((-torch.expm1(-steps)).log())


def _chunks(t: Tensor, w: int) -> Tensor:
    """(b h n c) -> (b h r w c); what is filled up is zero: it writes nothing and nothing decays."""
    return F.pad(t, (0, 0, 0, -t.shape[2] % w)).unflatten(2, (-1, w))


def _since(decay: Tensor) -> Tensor:
    """log α of all tokens up to each and with it, (... w d)."""
    return decay.cumsum(dim=-2)


def _until(decay: Tensor) -> Tensor:
    """log α of all tokens after each, (... w d)."""
    return F.pad(decay[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(dim=-2).flip(-2)


def _products(q: Tensor, k: Tensor, decay: Tensor) -> Tensor:
    """Σ_d q_i k_j Π α between them, (... w w), where token j is not after token i, and zero elsewhere."""
    w = q.shape[-2]
    if decay.shape[-1] == 1:
        after = torch.ones(w, w, dtype=torch.bool, device=q.device).triu()
        between = decay.expand(*decay.shape[:-1], w).masked_fill(after, 0.0).cumsum(dim=-2)
        return (q @ k.mT) * between.masked_fill(after.triu(1), float("-inf")).exp()
    found = (q * k).sum(dim=-1)[..., None, None]  # (... w 1 1)
    while (size := found.shape[-1]) < w:
        # of two neighbouring parts, the tokens of the second ask those of the first
        q2, k2, decay2 = (t.unflatten(-2, (-1, 2, size)) for t in (q, k, decay))
        asks = q2[..., 1, :, :] * _since(decay2[..., 1, :, :]).exp()
        keys = k2[..., 0, :, :] * _until(decay2[..., 0, :, :]).exp()
        found = _joined(found, asks @ keys.mT)
    return found.squeeze(-3)


def _inverse(lower: Tensor) -> Tensor:
    """Of I + lower, (... w w), which is zero on and above the diagonal, by halves."""
    w = lower.shape[-1]
    found = torch.ones_like(lower[..., :1])[..., None]  # (... w 1 1)
    while (size := found.shape[-1]) < w:
        parts = lower.unflatten(-2, (-1, 2, size)).unflatten(-1, (-1, 2, size))[..., :, 1, :, :, 0, :]
        between = parts.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # (... r size size)
        first, second = found[..., 0::2, :, :], found[..., 1::2, :, :]
        found = _joined(found, -second @ between @ first)
    return found.squeeze(-3)


def _joined(blocks: Tensor, below: Tensor) -> Tensor:
    """Neighbouring blocks on the diagonal as one, with what stands below the first: (... r s s) -> (... r/2 2s 2s)."""
    first, second = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
    upper = torch.cat([first, torch.zeros_like(first)], dim=-1)
    return torch.cat([upper, torch.cat([below, second], dim=-1)], dim=-2)

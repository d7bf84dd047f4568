"""Masks of transformers as ours.

What we tell transformers to hand to the attention functions says what it means by its axes, so that no head needs a
tensor of all pairs where keys and the order of tokens say it all. An axis of one entry is the same for all.

    (b m)        which keys exist, whoever asks
    (b 1 m)      which keys exist, under a causal mask
    (b h n m)    pairs: windows, packed sequences, caches of a fixed size, and what a user hands over

Where there is none, the model asked for none: then, as for transformers' own functions, the order of tokens counts if
the attention module says `is_causal`.
"""

from typing import Any

import torch
from torch import Tensor

from attnzoo.core import Mask
from attnzoo.errors import ZooError

HIDES = -1e4
"""What is added to a score that shall not count is this at most: people write -inf, the least number, -1e9, -10000."""


def make_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: Any = "cpu",
    **_: Any,
) -> Tensor:
    """The mask that transformers hands to each attention function of a forward.

    Args:
        batch_size, q_length, kv_length: b, n and m.
        q_offset, kv_offset: Positions of the first query and the first key; of queries a tensor where a cache has a
            fixed size.
        mask_function: Which pairs are allowed, of indices.
        attention_mask: Which tokens exist, (b m) or longer.
        local_size: Length of the window, if there is one.
        allow_is_causal_skip: Whether `mask_function` is causal, but for the window.
        use_vmap: Whether `mask_function` wants single indices.
        device: Where it is made.

    Raises:
        ZooError: AZ953, when `attention_mask` has neither two axes nor four.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    if attention_mask is not None and attention_mask.ndim != 2:
        raise ZooError(
            "AZ953",
            f"`attention_mask` has shape {tuple(attention_mask.shape)}",
            help="hand (batch, tokens) with 1 for tokens that exist, or (batch, 1, queries, keys)",
        )
    wide = local_size is not None and kv_length + kv_offset <= local_size
    in_order = mask_function is causal_mask_function or (allow_is_causal_skip and wide)
    # ours lets the last query see the last key; in a cache of a fixed size empty places follow it
    newest_last = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if in_order and newest_last:
        return _existing(attention_mask, kv_length, kv_offset, device)[:, None]
    if mask_function is bidirectional_mask_function:
        return _existing(attention_mask, kv_length, kv_offset, device)
    pairs = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    assert pairs is not None  # nothing was left to a flag
    return pairs


def _existing(attention_mask: Tensor | None, m: int, first: int, device: Any) -> Tensor:
    """Which keys exist, (b m), or (1 1) when all do."""
    if attention_mask is not None:
        missing = max(0, first + m - attention_mask.shape[1])
        keys = torch.nn.functional.pad(attention_mask.bool(), (0, missing))[:, first : first + m]
        if torch.compiler.is_compiling() or not bool(keys.all()):
            return keys
    return torch.ones(1, 1, dtype=torch.bool, device=device)


def read_mask(given: Tensor | None, is_causal: bool, b: int, n: int, m: int) -> Mask:
    """What transformers hands to an attention function, as a mask of ours.

    Args:
        given: What `make_mask` made, or a user's own.
        is_causal: What the attention module says, for where there is none.
        b, n, m: Samples, queries, keys.

    Raises:
        ZooError: AZ953 for one that adds to the scores, or none at all where it is not clear which query and key
            belong together; AZ405 for one about other tokens.
    """
    if given is None:
        if is_causal and 1 < n != m:
            raise ZooError(
                "AZ953",
                f"a causal model made no mask for {n} queries and {m} keys, which may be aligned in two ways",
                help="hand it the whole mask, (batch, 1, queries, keys)",
            )
        return Mask(causal=is_causal)
    if given.ndim in (2, 3):
        keys = None if given.shape[-1] == 1 != m else given.flatten(0, -2)
        return Mask(keys=_for_all(keys, b), causal=given.ndim == 3)
    allowed = _allowed(given)
    if allowed.shape[1] == allowed.shape[2] == 1 < n:
        return Mask(keys=_for_all(allowed[:, 0, 0], b))
    return Mask(pairs=allowed)


def _for_all(keys: Tensor | None, b: int) -> Tensor | None:
    """Keys of one sample as those of b."""
    return keys.expand(b, -1) if keys is not None and keys.shape[0] == 1 else keys


def _allowed(given: Tensor) -> Tensor:
    """A mask of four axes as a boolean."""
    if given.dtype == torch.bool:
        return given
    if not given.is_floating_point():
        raise ZooError(
            "AZ953",
            f"a mask of four axes is boolean, or added to the scores; this is {given.dtype}",
            why="numbers could mean that a pair is allowed, or what is added",
            help="compare first: attention_mask=mask.bool() in which True may attend",
        )
    allowed = given == 0
    plain = (allowed | (given <= HIDES)).all()
    if torch.compiler.is_compiling():  # a question that a graph cannot ask is asked when it runs
        torch._assert_async(plain, "a mask adds numbers other than 0 and -inf to the scores")
    elif not bool(plain):
        raise ZooError(
            "AZ953",
            "a mask adds numbers other than 0 and -inf to the scores",
            why="a bias, such as ALiBi's or of relative positions, is part of a mechanism and no mask",
            help="choose a model without one, or hand a boolean mask in which True may attend",
        )
    return allowed


def up_to_newest(pairs: Tensor) -> Tensor:
    """Pairs without the keys at the end that nobody sees: empty places of a cache of a fixed size, (b h n m).

    Args:
        pairs: (b h n m).
    """
    seen = pairs.flatten(0, 2).any(dim=0).nonzero()
    last = int(seen.max()) + 1 if len(seen) else 0
    return pairs[..., : max(last, pairs.shape[2])]


def in_parts(pairs: Tensor, is_causal: bool) -> Mask | None:
    """Pairs that keys and the order of tokens say as well, said so; None where they do not.

    Args:
        pairs: (b h n m), the last query belonging to the last key.
        is_causal: What is meant where one query leaves it open.
    """
    (n, m), keys = pairs.shape[2:], pairs[:, 0].any(dim=1)
    for causal in (is_causal, not is_causal):
        mask = Mask(keys=keys, causal=causal)
        whole = mask.dense(n, m, pairs.device)
        if whole is not None and torch.equal(whole.expand_as(pairs), pairs):
            return mask
    return None

"""Making mechanisms known to transformers, with the masks that go with them."""

import inspect
import re
import threading
from collections.abc import Mapping
from typing import Any

from attnzoo.alone.build import planned
from attnzoo.errors import ZooError
from attnzoo.hf.attention import Attention, Refusal
from attnzoo.hf.masks import make_mask
from attnzoo.hf.support import support_of, supported, those_that

NAME = re.compile(r"attnzoo:[a-z][a-z0-9_]*(/[a-z][a-z0-9_]*)?")
THEIRS = ("flash", "sdpa", "flex_attention")
"""Words by which transformers knows implementations of its own."""
_REGISTERED: dict[str, Attention] = {}
"""What is registered, by name; nothing is ever put in the place of another."""
_LOCK = threading.Lock()


def register_with_transformers() -> tuple[str, ...]:
    """Register every mechanism that can work inside a model of transformers, with its default options.

        attnzoo.register_with_transformers()
        model = AutoModelForCausalLM.from_config(config, attn_implementation="attnzoo:softmax")

    Those that cannot are there too, and say why as soon as a model calls them. Once more changes nothing.

    Returns:
        The names of those that can: `attnzoo:softmax`.

    Raises:
        ZooError: AZ950, when transformers is missing, or too old.
    """
    _interfaces()
    found = supported()
    for name in (name for name, support in found.items() if not support):
        refusal = Refusal(name, found[name].refused)
        _set(f"attnzoo:{name}", refusal, refusal)
    return tuple(register(f"attnzoo:{name}", name) for name, support in found.items() if support)


def register(name: str, mechanism: str | Mapping[str, Any], *, seed: int = 0, **options: Any) -> str:
    """Register a mechanism with options, or a fusion of several, for transformers.

        attnzoo.hf.register("attnzoo:performer_64", "performer", features=64)
        attnzoo.hf.register("attnzoo:both", {"fuse": "mean", "of": ["softmax", "elu_linear"]})

    Args:
        name: What `attn_implementation` will be: `attnzoo:` and a name of one's own.
        mechanism: A name, or what recipes write under `attention:`, as a mapping or a text.
        seed: Of random numbers that a mechanism draws when it is built; they depend on the number of the layer, too.
        options: The mechanism's own, as `attnzoo.show(name)` lists them.

    Returns:
        The name.

    Raises:
        ZooError: AZ950 transformers is missing; AZ951 a mechanism that cannot work there; AZ954 a name that cannot be,
            or is taken; AZ201 to AZ214 a mechanism or options that cannot be.
    """
    _interfaces()
    if not isinstance(name, str) or not NAME.fullmatch(name) or any(word in name for word in THEIRS):
        raise ZooError(
            "AZ954",
            f"`{name}` cannot be the name of an attention implementation",
            why="transformers tells those of its own by `flash`, `sdpa` and `flex_attention` in a name, and others' "
            "from the hub by a `/`",
            help="write attnzoo: and a name of a-z, 0-9 and _, such as `attnzoo:mine`",
        )
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ZooError("AZ954", f"`seed` is a whole number from 0 to 2**32 - 1, not {seed!r}")
    plan = planned(mechanism, options, {})
    support = support_of(plan)
    if not support:
        raise ZooError(
            "AZ951",
            f"`{plan}` cannot work inside a model of transformers",
            why=support.refused,
            help=f"these can: {those_that(bool)}",
        )
    with _LOCK:
        before = _REGISTERED.get(name)
        if before is None:
            _REGISTERED[name] = Attention(plan, support, seed)
            _set(name, _REGISTERED[name], make_mask)
        elif (str(before.plan), before.seed) != (str(plan), seed):
            raise ZooError(
                "AZ954",
                f"`{name}` stands for `{before.plan}` with the seed {before.seed} already",
                why="models that are in use would change",
                help="choose another name",
            )
    return name


def _set(name: str, attention: Any, mask: Any) -> None:
    """Both at once: without a mask of its own an implementation loses causality."""
    of_attention, of_masks = _interfaces()
    of_attention.register(name, attention)
    of_masks.register(name, mask)


def _interfaces() -> tuple[Any, Any]:
    """Transformers' registers of attention functions and of mask functions.

    Raises:
        ZooError: AZ950.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise _missing(str(error)) from error
    if "q_length" not in inspect.signature(sdpa_mask).parameters:
        raise _missing("its masks are made in another way than since 5.4")
    return AttentionInterface, AttentionMaskInterface


def _missing(why: str) -> ZooError:
    return ZooError(
        "AZ950", "transformers is missing, or too old", why=why, help='pip install --upgrade "attnzoo[hf]"'
    )

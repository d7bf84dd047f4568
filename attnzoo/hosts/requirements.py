"""What a site requires of a card, and what a card does not meet."""

from dataclasses import dataclass

from attnzoo.core import Card, Family, FusionCard, Law


@dataclass(frozen=True)
class Requirements:
    """What a place in a host asks of whatever is put there.

    Args:
        masks: Kinds of mask that must be honoured.
        context: Whether there is a context to read from.
        context_grid: Number of its grid dimensions.
        may_join: Whether the tokens of another stream may join the own ones as keys, for who reads both.
        grid: Number of grid dimensions on offer.
        varying_length: Why the number of tokens may change from call to call; empty when it may not.
        open_end: Why the last token is not where the grid ends; empty when it is.
        drops_tokens: Why tokens may be missing from the grid, and the others in any order; empty when they may not.
        rotary: Whether queries and keys are turned by their positions, which happens inside the heads.
        no_maps: Why no map can be handed over; empty when it can.
    """

    masks: frozenset[str] = frozenset()
    context: bool = False
    context_grid: int = 1
    may_join: bool = False
    grid: int = 1
    varying_length: str = ""
    open_end: str = ""
    drops_tokens: str = ""
    rotary: bool = False
    no_maps: str = ""


def unmet(card: Card, required: Requirements) -> list[str]:
    """The reasons why a card cannot go there; none when it can."""
    reasons = []
    missing = [
        kind for kind in ("keys", "causal", "pairs") if kind in required.masks and kind not in card.masks
    ]
    if missing:
        claims = ", ".join(sorted(card.masks)) or "none"
        reasons.append(
            f"the site requires masks of kind {', '.join(missing)}; `{card.name}` claims masks: {claims}"
        )
    if required.context and not card.context:
        reasons.append(f"the site reads from a context; `{card.name}` cannot")
    joins = required.may_join and card.context == "beside"
    if card.family is Family.CROSS and card.context and not required.context and not joins:
        reasons.append(f"`{card.name}` reads from a second stream; the site has none")
    if required.context and isinstance(card.context_grid, int) and card.context_grid != required.context_grid:
        reasons.append(
            f"`{card.name}` needs a context on a {card.context_grid}-D grid; that of the site is "
            f"{required.context_grid}-D"
        )
    if isinstance(card.grid, int) and card.grid != required.grid:
        reasons.append(f"`{card.name}` needs a {card.grid}-D grid; the site has a {required.grid}-D grid")
    if card.fixed_length is True and required.varying_length:
        reasons.append(f"`{card.name}` takes a fixed number of tokens; {required.varying_length}")
    if card.grid is not None and required.open_end:
        reasons.append(f"`{card.name}` needs to know where the grid ends; {required.open_end}")
    if (card.fixed_length or card.grid is not None) and required.drops_tokens:
        reasons.append(f"`{card.name}` needs every token in its place; {required.drops_tokens}")
    elif required.drops_tokens and Law.PERMUTATION_EQUIVARIANT not in card.laws:
        reasons.append(f"`{card.name}` may depend on the order of the tokens; {required.drops_tokens}")
    if card.given and required.no_maps:
        maps = ", ".join(f"`{name}`" for name in card.given)
        reasons.append(f"`{card.name}` needs the map {maps} from the caller; {required.no_maps}")
    return reasons


def unmet_by_fusion(card: FusionCard, required: Requirements) -> list[str]:
    """The reasons why a fusion cannot merge there, whatever its branches; none when it can."""
    hidden = {"causal": "later tokens are", "keys": "padding is", "pairs": "pairs of tokens are"}
    does = "mixes tokens" if card.mixes_tokens else "lets a branch work on what others gave"
    reasons = [
        f"{words} hidden there, and this fusion {does}"
        for kind, words in hidden.items()
        if kind in required.masks and kind not in card.masks
    ]
    if required.context and card.mixes_tokens:
        reasons.append("masks are about the context there, and this fusion mixes its own tokens")
    return reasons

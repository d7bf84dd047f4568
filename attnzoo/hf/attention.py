"""The attention function that transformers calls: a head of the zoo between somebody else's projections."""

import copy
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.core import Head, Law, Layout, Mask, Site, watch
from attnzoo.errors import ZooError
from attnzoo.hf.chance import drawn_from
from attnzoo.hf.masks import in_parts, read_mask, up_to_newest
from attnzoo.hf.support import Support, those_that
from attnzoo.recipe.plan import Plan

OTHER_ATTENTION = {
    "softcap": "caps the scores",
    "s_aux": "adds a sink to the scores",
    "sinks": "adds a sink to the scores",
    "position_bias": "adds a bias to the scores",
    "indices": "keeps some keys only",
    "block_indices": "keeps some blocks of keys only",
    "cu_seq_lens_q": "packs sequences for flash attention; `position_ids` alone says the same",
    "cache": "is a paged cache",
}
"""Arguments of attention functions that change what is computed, and how."""


@dataclass(frozen=True, eq=False)
class Attention:
    """A head as a function of queries, keys, values and a mask, as transformers calls it.

    The head lies on no module of the model, so nothing of it is saved, loaded or trained. What it draws (the features
    of `performer`) is a function of `seed`, the number of the layer and the shape of the heads: it is the same
    tomorrow, in a copy, and on another device.

    Args:
        plan: The head with its options.
        support: What it can do.
        seed: Of what the head draws when it is built.
    """

    plan: Plan
    support: Support
    seed: int = 0
    _heads: dict[tuple, Head] = field(default_factory=dict, init=False, repr=False)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What each query receives, (b n h d), and the weights (b h n m) where `output_attentions` asks for them.

        Args:
            module: The attention of a layer: it says its number, whether it is causal, and has the configuration.
            query: (b h n d).
            key, value: (b g m d), g heads that divide h.
            attention_mask: As `masks` describes it.
            scaling: What dot products are multiplied with; 1/√d unless said. Heads that divide by √d give what is
                asked, for others the queries are longer.
            dropout: Of the weights, in training.
            is_causal: Whether later keys are hidden where there is no mask; what the module says unless said.
            others: What else models hand over; what would change the result is refused.

        Raises:
            ZooError: AZ952 what the mechanism does not claim, AZ953 what none does, AZ405 a mask of other tokens.
        """
        b, h, n, d = query.shape
        self._refuse_arguments(others, d, value.shape[-1], dropout)
        if key.shape[1] != h:  # each head of keys and values is for several of queries
            key, value = (t.repeat_interleave(h // t.shape[1], dim=1) for t in (key, value))
        if is_causal is None:
            is_causal = bool(getattr(module, "is_causal", True))  # as transformers' own functions read it
        mask = read_mask(attention_mask, is_causal, b, n, key.shape[2])
        mask.fit(b, h, n, key.shape[2])
        self._refuse_model(module, mask, is_causal, n, key.shape[2])
        unseen = 0
        if mask.pairs is not None:
            mask, m = self._honoured(mask.pairs, is_causal)
            unseen, key, value = key.shape[2] - m, key[:, :, :m], value[:, :, :m]
        if scaling is not None and scaling != d**-0.5:
            query = query * (scaling * d**0.5)
        wanted = (h, d, *_layer(module), float(dropout), module.training, query.device)
        head = self._heads.get(wanted)
        if head is None:
            head = self._build(*wanted)
        layout = Layout((key.shape[2],))
        if others.get("output_attentions"):
            out, weights = _watched(head, query, key, value, mask, layout)
            weights = F.pad(weights, (0, unseen))
        else:
            out, weights = head(query, key, value, mask=mask, layout=layout), None
        return out.transpose(1, 2).contiguous(), weights

    @torch.compiler.disable  # a graph would build it again in each forward; it finds what a forward before has built
    def _build(
        self, h: int, d: int, layer: int, depth: int, dropout: float, training: bool, device: torch.device
    ) -> Head:
        """The head of a layer, kept: nobody changes it, so threads and models share it."""
        site = Site(f"layers.{layer}", h * d, h, Layout((8,)), layer, depth, attn_drop=dropout)
        with drawn_from((self.seed << 16) + layer):
            head = self.plan.head(site).train(training).to(device)
        return self._heads.setdefault((h, d, layer, depth, dropout, training, device), head)

    def _honoured(self, pairs: Tensor, is_causal: bool) -> tuple[Mask, int]:
        """A mask of pairs in the parts that the head claims, and of how many keys: nobody sees those that follow."""
        card = self.plan.card
        if "pairs" in card.masks and Law.PERMUTATION_EQUIVARIANT in card.laws:
            return Mask(pairs=pairs), pairs.shape[3]
        if pairs.shape[3] > pairs.shape[2]:  # the last key must be the newest
            pairs = up_to_newest(pairs)
        if "pairs" in card.masks:
            return Mask(pairs=pairs), pairs.shape[3]
        parts = in_parts(pairs, is_causal)
        if parts is None:
            raise self._cannot(
                "the mask is one of pairs: a sliding window, packed sequences, or what was handed over",
                f"it honours only {', '.join(sorted(card.masks))}",
                those_that(lambda support: support.pairs),
            )
        return parts, pairs.shape[3]

    def _refuse_model(self, module: nn.Module, mask: Mask, is_causal: bool, n: int, m: int) -> None:
        """Refuse to work where the card says that it cannot."""
        if mask.causal and not self.support.causal:
            raise self._cannot(
                "no token may see later ones there",
                "it has no causal form",
                those_that(lambda support: support.causal),
            )
        if not self.support.cross and (_reads_others(module) or (n != m and not is_causal)):
            raise self._cannot(
                "it has cross-attention",
                "it reads no other tokens than its own",
                those_that(lambda support: support.causal and support.cross),
            )
        if n < m and is_causal and not self.support.cache:
            raise self._cannot(
                f"a cache holds {m - n} of its {m} tokens",
                "it needs all tokens at once",
                f"say use_cache=False, or take {those_that(lambda support: support.cache)}",
            )

    def _cannot(self, where: str, why: str, instead: str) -> ZooError:
        return ZooError(
            "AZ952",
            f"`{self.plan}` cannot work in this model: {where}",
            why=f"{why}, and a mechanism that works otherwise than it is asked to gives wrong results without a word",
            help=f"these can: {instead}" if instead.startswith("`") else instead,
        )

    def _refuse_arguments(self, others: dict[str, Any], d: int, of_values: int, dropout: float) -> None:
        """Refuse what would be ignored."""
        fault, help = "", "choose a model without it, or transformers' own attention"
        for name, what in OTHER_ATTENTION.items():
            if others.get(name) is not None:
                fault = f"`{name}` {what}"
        if of_values != d:
            fault = f"queries and keys have {d} channels, values {of_values}"
        if dropout and not self.support.dropout:
            fault = f"{dropout:g} of the weights are to be dropped, and it forms none"
            help = "set the dropout of attention to 0 in the configuration"
        if others.get("output_attentions") and not self.support.weights:
            fault = "weights are asked for, and it forms none of queries over keys"
            help = "leave output_attentions out"
        if fault:
            raise ZooError("AZ953", f"`{self.plan}` cannot do what the model asks: {fault}", help=help)


@dataclass(frozen=True)
class Refusal:
    """Stands under the name of a mechanism that cannot work, and says why.

    Args:
        mechanism: Its name.
        reason: Why.
    """

    mechanism: str
    reason: str

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """What transformers calls, for masks and for attention.

        Raises:
            ZooError: AZ951.
        """
        raise ZooError(
            "AZ951",
            f"`{self.mechanism}` cannot work inside a model of transformers",
            why=self.reason,
            help=f"these can: {those_that(bool)}",
        )


def _layer(module: nn.Module) -> tuple[int, int]:
    """Index of a layer, and number of layers. Where transformers does not number them, all are the first."""
    layer, config = getattr(module, "layer_idx", None) or 0, getattr(module, "config", None)
    return layer, max(getattr(config, "num_hidden_layers", None) or 0, layer + 1)


def _reads_others(module: nn.Module) -> bool:
    """Whether the model has cross-attention: by numbers of tokens alone it would be found out by chance."""
    config = getattr(module, "config", None)
    flags = (getattr(config, "is_encoder_decoder", False), getattr(config, "add_cross_attention", False))
    return any(flags) or bool(getattr(module, "is_cross_attention", False))


def _watched(
    head: Head, q: Tensor, k: Tensor, v: Tensor, mask: Mask, layout: Layout
) -> tuple[Tensor, Tensor]:
    """What a head gives, and its weights, seen in a copy, because others may be using it."""
    seen, own = list[Tensor](), copy.deepcopy(head)
    with watch(own, "weights", lambda _, weights: seen.append(weights)):
        return own(q, k, v, mask=mask, layout=layout), seen[-1]

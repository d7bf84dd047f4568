"""What the backbones of our own have in common: what timm asks of every model, and how timm builds them."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from attnzoo.core import Site
from attnzoo.core.card import Given
from attnzoo.errors import RecipeError, did_you_mean
from attnzoo.hosts.given import NO_MAPS, GivenFeatures
from attnzoo.hosts.info import BackboneInfo, Put, init_normal, undecayed
from attnzoo.hosts.skip import Skip


class Backbone(nn.Module):
    """A model of images that timm could have built. Concrete ones set `head` and make features and logits."""

    head: nn.Module
    given: Mapping[str, Given] = NO_MAPS
    """Maps that the components ask for, by name."""
    grad_checkpointing = False

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimiser must not decay."""
        return undecayed(self)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are computed a second time in the backward pass, to save memory."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head


def check_format(output_fmt: str) -> None:
    """Refuse intermediates in a format that nobody knows.

    Args:
        output_fmt: `NCHW` for maps (b c y x), `NLC` for tokens (b n c).

    Raises:
        ValueError: When it is another.
    """
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"features are NCHW or NLC, not `{output_fmt}`")


def init_linear(model: nn.Module) -> None:
    """Weights of Linear layers from a truncated N(0, 0.02²), their biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def base_arguments(
    bases: Mapping[str, Mapping[str, Any]], base: str, what: str, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """The constructor arguments of a base, with those that differ from it.

    Args:
        bases: Every base of the kind.
        base: The name of one.
        what: What such models are called.
        arguments: Those that differ.

    Raises:
        RecipeError: AZ301, when there is no such base.
    """
    if base not in bases:
        names = ", ".join(f"`{name}`" for name in bases)
        raise RecipeError(
            "AZ301",
            f"there is no {what} called `{base}`",
            help=did_you_mean(base, list(bases)) or f"there are {names}",
        )
    return {**bases[base], **arguments}


def build_backbone(
    model: Callable[..., nn.Module],
    arguments: Mapping[str, Any],
    info: BackboneInfo,
    *,
    filter_fn: Callable[[dict[str, Tensor], Any], dict[str, Tensor]],
    named_inputs: bool,
    pretrained: bool = False,
    pretrained_cfg: Mapping[str, Any],
    init: str = "timm",
    skip: Skip = Skip(),  # noqa: B008 - frozen
    device: Any = None,
    dtype: torch.dtype | None = None,
    **timm_options,
) -> nn.Module:
    """A backbone of our own, as timm builds its own.

    Args:
        model: Its class, with the components that are put at its sites.
        arguments: Of its constructor.
        info: The inspected base.
        filter_fn: Makes a state dict fit the model.
        named_inputs: Whether `forward` takes more by name than images.
        pretrained, pretrained_cfg, init, timm_options: As for `kinds.ImageHost.build`.
        skip: None that does anything: the recipe's is refused before.
        device: Where it is built.
        dtype: Type of its parameters.
    """
    features = {
        "out_indices": timm_options.pop("out_indices", 3),
        "feature_cls": GivenFeatures if named_inputs else "getter",
    }
    with torch.device(device) if device is not None else nullcontext():
        built = build_model_with_cfg(
            model,
            pretrained_cfg.get("architecture", info.base),
            pretrained,
            pretrained_cfg=dict(pretrained_cfg),
            pretrained_filter_fn=filter_fn,
            feature_cfg=features,
            **{**arguments, **timm_options},
        )
    if init == "normal" and not pretrained:
        init_normal(built)
    return built.to(dtype=dtype)


def with_heads(info: BackboneInfo, put: Callable[[Site], Any]) -> Put:
    """`put`, at sites with the heads that a recipe says for their layers."""
    return partial(_with_heads, info, put)


def _with_heads(info: BackboneInfo, put: Callable[[Site], Any], site: Site) -> Any:
    return put(replace(site, heads=info.heads[site.layer]))

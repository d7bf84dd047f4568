"""The kinds of host that a recipe can name."""

from collections.abc import Mapping
from inspect import signature
from typing import Any, Protocol

from torch import nn

from attnzoo.core.card import Given
from attnzoo.hosts import compact_transformer, dual, pyramid, vision_transformer
from attnzoo.hosts.info import BackboneInfo, Put, PutPool
from attnzoo.hosts.skip import Skip


class ImageHost(Protocol):
    """What a module offers to be a kind of backbone. timm finds the configurations of its models in it."""

    __name__: str
    default_cfgs: dict[str, Any]

    def host_info(self, base: str, arguments: Mapping[str, Any]) -> BackboneInfo:
        """Look at a base without allocating it."""

    def model_cfg(
        self,
        name: str,
        base: str,
        arguments: Mapping[str, Any],
        mean: list[float] | None,
        std: list[float] | None,
    ) -> dict[str, Any]:
        """timm's configuration of a composed model.

        Args:
            name: The model's own name.
            base: The base's name.
            arguments: Constructor arguments that differ from the base's.
            mean: Mean of the images by channel; the base's when None.
            std: Standard deviation of the images by channel; the base's when None.
        """

    def build(
        self,
        info: BackboneInfo,
        put: Put,
        *,
        pool: PutPool | None = None,
        given: Mapping[str, Given],
        pretrained: bool = False,
        pretrained_cfg: Mapping[str, Any],
        init: str = "timm",
        skip: Skip,
        **timm_options,
    ) -> nn.Module:
        """The base with mechanisms at its sites.

        Args:
            info: The inspected base, without the sites that a recipe leaves empty.
            put: Builds what is put at a site.
            pool: Builds what is put at the site `pool`; None for the host's own way.
            given: Maps that the components ask for, by name.
            pretrained: Whether timm shall load the weights that `pretrained_cfg` names.
            pretrained_cfg: timm's configuration of the model.
            init: `timm` for the host's own initialisation, or `normal` for N(0, 0.02²) everywhere.
            skip: What blocks hand on.
            timm_options: What goes to timm's builder and not to the model: `features_only`, `device`, ...
        """


HOSTS: dict[str, ImageHost] = {
    "vit": vision_transformer,
    "cct": compact_transformer,
    "pyramid": pyramid,
    "dual": dual,
}
"""Kind of backbone to the module that knows it. `seq2seq` and `sequence` are no backbones of timm."""
TAKEN = frozenset(
    parameter
    for host in (
        vision_transformer.ZooVisionTransformer,
        compact_transformer.CompactTransformer,
        dual.DualTransformer,
        pyramid.PyramidTransformer,
    )
    for method in (host.forward, host.forward_features, host.forward_intermediates, host.forward_head)
    for parameter in signature(method).parameters
)
"""Names of arguments of the models, which no map can have."""

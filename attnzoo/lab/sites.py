"""What is put at each site of a model, by the names that recipes use."""

from torch import nn

from attnzoo.core import Mechanism
from attnzoo.hosts.dual import DualTransformer
from attnzoo.hosts.pyramid import PyramidTransformer
from attnzoo.hosts.seq2seq import Seq2Seq
from attnzoo.lab.timm_models import untapped, why_not


def sites_of(model: nn.Module) -> dict[str, Mechanism]:
    """What is put at each site of a model, by name, in the order of the model's modules.

    Names are those of recipes and of `Site.name`: `blocks.3`, `decoder.0.cross`, `a.1.self`. Of timm's own models, and
    where somebody put a mechanism into a network by hand, they are where the mechanism is, without its own name.

    Args:
        model: A model of any host, or one of timm's inside `attnzoo.lab.timm_models.tapped`.

    Raises:
        ZooError: AZ903, when there is none.
    """
    inside: set[nn.Module] = set()
    sites: dict[str, Mechanism] = {}
    for path, module in model.named_modules():
        if isinstance(module, Mechanism) and module not in inside:
            sites[_site(model, path)] = module
            inside |= set(module.modules())
    if not sites:
        raise untapped(model, why_not(model))
    return sites


def _site(model: nn.Module, path: str) -> str:
    """The site of the mechanism at a path: what `HostInfo.module_path` undoes."""
    place, _, name = path.rpartition(".")
    kind = "cross" if name == "cross" else "self"
    if isinstance(model, DualTransformer):
        _, layer, stream = place.split(".")
        return f"{stream}.{layer}.{kind}"
    if isinstance(model, PyramidTransformer):
        return place.replace(".blocks.", ".")
    if isinstance(model, Seq2Seq) and place.startswith("decoder."):
        return f"{place}.{kind}"
    return place or path

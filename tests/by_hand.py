"""What the files of single mechanisms and fusions share: small inputs, closeness, and wrong versions to be caught."""

import sys
from unittest.mock import patch

import torch
from torch import nn

from attnzoo.core import Layout, Mask, Site, watch


def place(dim: int, heads: int = 1, tokens: int = 2, **fields) -> Site:
    """A site for a line of tokens."""
    return Site("hand", dim, heads, Layout((tokens,)), **fields)


def row(*values: float) -> torch.Tensor:
    """One sample, one head, one channel, these tokens: (1 1 n 1)."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, -1, 1)


def line(*values: float) -> torch.Tensor:
    """One sample, one channel, these tokens: (1 n 1)."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1)


def normal(*shape: int) -> torch.Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64)


def near(found, wanted, tolerance: float = 1e-12) -> None:
    """Equal to numbers that were worked out by hand, or in another way."""
    wanted = torch.as_tensor(wanted, dtype=torch.float64).detach()
    torch.testing.assert_close(found.detach().double().reshape(wanted.shape), wanted, rtol=0, atol=tolerance)


def spread(module: nn.Module, std: float = 0.7) -> nn.Module:
    """The module in float64 and eval mode with parameters of a size that matters."""
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
    return module


def set_all(module: nn.Module, value: float) -> nn.Module:
    """Every parameter to one number, in float64."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


def seen(module: nn.Module, *inputs, tap: str = "weights", **arguments) -> torch.Tensor:
    """What the only tap of that name sees."""
    found = []
    with watch(
        module, None, lambda name, w: found.append(w.detach()) if name.rpartition(".")[2] == tap else None
    ):
        module(*inputs, **arguments)
    (weights,) = found
    return weights


def count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def wrong(cls: type, **members) -> type:
    """The class with some of its methods replaced by wrong ones."""
    return type(f"Wrong{cls.__name__}", (cls,), members)


def patched(cls: type, name: str, other) -> type:
    """The class, wrong because a function of its module is another one while it mixes."""
    module = sys.modules[cls.__module__]

    def mix(self, *inputs, **where):
        with patch.object(module, name, other):
            return cls.mix(self, *inputs, **where)

    return wrong(cls, mix=mix)


def caught(oracle_test, mutant: type) -> None:
    """The comparison of a test made by `against` fails for a wrong version, and for no other reason."""
    result = oracle_test.compare(mutant, shrink=False, examples=200)  # the first that fails ends it
    assert result.status == "failed", "a wrong version was not noticed"
    assert result.reason.startswith("claimed: equals its oracle; but"), result.reason


def narrow(cls: type, shapes: list[tuple[int, ...]], *, site: Site, given=None, **options) -> None:
    """float32 and bfloat16 stay near float64, with the same rounded parameters and inputs, under masks and without.

    Args:
        cls: A head or a mechanism.
        shapes: Of its inputs, all of one length.
        site: Where it is put.
        given: Maps that it needs, by name.
        options: Its options.
    """
    b, n = shapes[0][0], shapes[0][-2]
    where = {"layout": site.layout, "given": given or {}}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for masked in (False, True, True):
            component = (
                spread(cls(site, **options), 0.3).to(dtype).double()
            )  # what is left is the arithmetic's
            kinds = component.card.masks if masked else ()
            heads = 1 if component.card.one_head else site.heads
            mask = Mask(
                keys=torch.rand(b, n) < 0.7 if "keys" in kinds else None,
                pairs=torch.rand(b, heads, n, n) < 0.7 if "pairs" in kinds else None,
                causal="causal" in kinds,
            )
            inputs = [normal(*shape).to(dtype).double() for shape in shapes]
            wanted = component(*inputs, mask=mask, **where).detach()
            found = component.to(dtype)(*(t.to(dtype) for t in inputs), mask=mask, **where)
            assert found.dtype == dtype
            near(found, wanted, tolerance * max(1.0, float(wanted.abs().max())))


def from_first(component, options, branches, merged):
    """What a fusion gives for a merge: with `start: identity` the first branch + γ (merge − first), per channel."""
    if options["start"] == "free":
        return merged
    if len(branches) == 1:
        return branches[0]
    return branches[0] + component.gamma * (merged - branches[0])


def merging(cls, change):
    """The fusion whose merge is changed, from the component, the branches and x."""
    return wrong(cls, merge=lambda self, branches, x: change(self, branches, x))


def fused(cls, arity, *branches, start="free", x=None, **options):
    """The merge of these numbers, one token of one channel each; parameters of one."""
    fusion = set_all(cls(place(1), arity, **({} if start is None else {"start": start}), **options), 1.0)
    tokens = [line(value) for value in branches]
    return fusion(tokens, line(0.0) if x is None else x)

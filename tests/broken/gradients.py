"""Components in which something does not learn, or does not count, and outputs that depend on how memory lies."""

import torch
from torch import nn

from attnzoo.core import Site
from broken.heads import Healthy, claims
from broken.tokens import HealthyTokens


class DropsOddChannel(Healthy):
    """Channels in pairs: the last of an odd number is lost."""

    def attend(self, q, k, v, *, mask, layout):
        even = q.shape[-1] // 2 * 2 or 1
        return super().attend(q[..., :even], k[..., :even], v, mask=mask, layout=layout)


class LearnsFirstHead(Healthy):
    """Only the first head has its temperature."""

    def score(self, q, k):
        return q @ k.mT / self.temperature[:1].exp()


class LearnsSomeRows(HealthyTokens):
    """A row of the matrix is overwritten."""

    def mix(self, x, source, *, mask, layout):
        weight = self.gating.weight * (torch.arange(x.shape[-1], device=x.device) > 0)[:, None]
        gate = nn.functional.linear(x + self.mean(x, mask, layout), weight, self.gating.bias).sigmoid()
        return x * self.gate(gate)


class LearnsByRounding(Healthy):
    """The gradient of a parameter that cancels is not nothing."""

    card = claims(Healthy, laws=set())

    def __init__(self, site: Site):
        super().__init__(site)
        self.shift = nn.Parameter(torch.zeros(site.heads, site.head_dim))

    def score(self, q, k):
        # the same for all keys of a query: a softmax cannot see it
        return super().score(q, k) + (q * self.shift[:, None]).sum(dim=-1, keepdim=True)


class BlindToLastToken(HealthyTokens):
    def mix(self, x, source, *, mask, layout):
        blind = torch.cat([x[:, :-1], 0 * x[:, -1:]], dim=1)
        return super().mix(blind, source, mask=mask, layout=layout)


class MixesDtypes(HealthyTokens):
    """A product of what autocast made and what it did not."""

    def mean(self, x, mask, layout):
        low = x @ torch.eye(x.shape[-1], device=x.device, dtype=x.dtype)
        return torch.bmm(
            low, torch.eye(x.shape[-1], device=x.device, dtype=x.dtype).expand(len(x), -1, -1)
        ).to(x.dtype) * 0 + (low[:1].dtype == x.dtype) * super().mean(x, mask, layout)


class ViewsTokens(HealthyTokens):
    """`view` fails where tokens do not lie row by row."""

    def mean(self, x, mask, layout):
        return super().mean(x.view(-1).view(x.shape), mask, layout)


class ReadsMemory(HealthyTokens):
    """Takes tokens for contiguous, as a kernel might."""

    def mean(self, x, mask, layout):
        b, n, c = x.shape
        enough = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset() >= x.numel()
        rows = torch.as_strided(x, (b, n, c), (n * c, c, 1)) if enough and x.device.type == "cpu" else x
        return super().mean(rows, mask, layout)


class FitsOneLength(HealthyTokens):
    """A weight for each position, of which the card says nothing."""

    def __init__(self, site, *, gate="open"):
        super().__init__(site, gate=gate)
        self.places = nn.Parameter(torch.ones(site.layout.length, 1))

    def mean(self, x, mask, layout):
        return super().mean(x, mask, layout) * self.places.mean() + 0 * (x * self.places).sum(1, keepdim=True)

"""How much of what a head gives comes from the image, or from the source.

He et al., "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", ACL 2025, §3, in a form for
any model: VHD and T-VHD. Interventions that strengthen such heads are elsewhere.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from attnzoo.core import InstrumentCard, Paper, Probe
from attnzoo.core.options import PositiveInt
from attnzoo.errors import ZooError
from attnzoo.lab.finding import Finding

EMBEDDINGS = ("patch_embed", "tokenizer", "embed")
"""What hosts call the module that makes tokens, before positions are added."""
PAD = 0


@dataclass(kw_only=True, eq=False)
class HeadDivergence(Probe):
    """VHD_h = ‖o_h(with T) − o_h(without T)‖₂ of the token that the answer is read from, o_h before the projection.

    T are the patches of an image, the source of a pair, or all tokens of a sequence but the last. The answer is read
    from the class token, where there is none from all tokens (their norms are averaged), of sequences from the last
    token. `divergence` is the mean over samples; `kept` the same after outliers: VHD_h counts as 0 where it lies more
    than a standard deviation above the mean of its layer, and ‖o_h(without T)‖² above that of its own: such a head is
    loud, not attentive. `selected` is the share of samples in which `kept` is above the median of the layer. The figure
    `t_vhd` is the sum over layers of the k largest. Standard deviations divide by the number of heads.

    Args:
        without: What stands in the place of T: embeddings of `zero`, or their `mean`, both with the positions of T. An
            empty source is all padding.
        tokens: Whether norms are of the token that the `answer` is read from, or averaged over `all`.
        k: How many heads of each layer count for T-VHD, or all where there are fewer.
        outliers: Whether heads that are loud without T count as `zero`, or are `kept`.
    """

    card = InstrumentCard(
        "head_divergence",
        "How much of what a head gives changes when the image, the source or the context is not there.",
        equation="VHD_h = ‖o_h(with T) − o_h(without T)‖₂",
        paper=Paper(
            "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
            "He et al.",
            2025,
            "arXiv:2412.13949",
            "§3",
        ),
        needs={"heads"},
        fidelity="adapted",
        notes="The paper takes images from the context of a language model. Of pairs the decoder is measured alone: "
        "in the encoder there is nothing but the source.",
    )
    without: Literal["zero", "mean"] = "zero"
    tokens: Literal["answer", "all"] = "answer"
    k: PositiveInt = 4
    outliers: Literal["zero", "kept"] = "zero"

    def measure(self, subject) -> Finding:
        leaves = [leaf for leaf in subject.able("heads") if subject.kind != "pairs" or _decodes(leaf)]
        prefix = subject.layout.prefix if subject.kind == "images" else 0
        found: dict[Any, list[Tensor]] = defaultdict(list)
        loud: dict[Any, list[Tensor]] = defaultdict(list)
        for batch, seen, _ in subject.recorded("heads"):
            with self._absent(subject, batch) as emptied:
                without = self._heads(subject, emptied)
            for leaf in leaves:
                here, gone = seen["heads", leaf].double().cpu(), without[leaf].double().cpu()  # (b h n d)
                asked = self._asked(subject, batch, here.shape[2], prefix)[:, None]  # (b 1 n)
                share = asked / asked.sum(dim=-1, keepdim=True).clamp(min=1)
                found[leaf].append(((here - gone).norm(dim=-1) * share).sum(dim=-1))  # (b h)
                loud[leaf].append((gone.square().sum(dim=-1) * share).sum(dim=-1))
        rows, total = [], torch.zeros(())
        for site in dict.fromkeys(
            leaf.site for leaf in leaves
        ):  # the heads of all branches are those of a layer
            there = [leaf for leaf in leaves if leaf.site == site]
            vhd = torch.cat([torch.cat(found[leaf]) for leaf in there], dim=1)  # (samples heads)
            kept = self._kept(vhd, torch.cat([torch.cat(loud[leaf]) for leaf in there], dim=1))
            selected = kept > kept.quantile(0.5, dim=1, keepdim=True)
            total = total + kept.topk(min(self.k, kept.shape[1])).values.sum(dim=1).mean()
            heads = [(leaf, head) for leaf in there for head in range(leaf.heads)]
            for i, at in enumerate(heads):
                values = {"divergence": vhd[:, i], "kept": kept[:, i], "selected": selected[:, i].double()}
                rows.append(subject.about(*at) | {name: float(v.mean()) for name, v in values.items()})
        return Finding.of(rows, shows="kept", figures={"t_vhd": float(total)})

    def _kept(self, vhd: Tensor, loud: Tensor) -> Tensor:
        """Divergence without outliers, (samples heads).

        Args:
            vhd: ‖o(with T) − o(without T)‖, (samples heads).
            loud: ‖o(without T)‖², (samples heads).
        """
        if self.outliers == "kept":
            return vhd
        far, noisy = (
            x > x.mean(dim=1, keepdim=True) + x.std(dim=1, correction=0, keepdim=True) for x in (vhd, loud)
        )
        return vhd.masked_fill(far & noisy, 0)

    def _asked(self, subject, batch, n: int, prefix: int) -> Tensor:
        """The tokens whose norms count, (b n) or (1 n)."""
        place = torch.arange(n)[None]
        if subject.kind == "pairs":
            real = batch.inputs[1].cpu() != PAD
            last = place == (real * place).amax(dim=1, keepdim=True)
            return real if self.tokens == "all" else last
        if self.tokens == "all" or (subject.kind == "images" and not prefix):
            return place >= 0
        return place == (0 if subject.kind == "images" else n - 1)

    @torch.no_grad()
    def _heads(self, subject, batch) -> dict[Any, Tensor]:
        """What the heads give for a batch."""
        seen: dict[Any, Tensor] = {}

        def keep(leaf, out, here) -> None:
            seen[leaf] = out

        with subject.editing("heads", keep):
            subject.call(batch)
        return seen

    @contextmanager
    def _absent(self, subject, batch) -> Iterator[Any]:
        """A batch whose forward has no T, while the block runs."""
        if subject.kind == "pairs":
            source, *rest = batch.inputs
            yield replace(batch, inputs=(torch.full_like(source, PAD), *rest))
            return
        named = (getattr(subject.model, name, None) for name in EMBEDDINGS)
        embedding = next((module for module in named if isinstance(module, torch.nn.Module)), None)
        if embedding is None:
            raise ZooError(
                "AZ924",
                f"`{subject.name}` has no module that is known to make its tokens",
                why=f"T is taken away where {', '.join(f'`{name}`' for name in EMBEDDINGS)} stands in a model",
                help="`head_importance` asks no such thing",
            )
        hook = embedding.register_forward_hook(lambda _module, _args, out: self._emptied(subject, out))
        try:
            yield batch
        finally:
            hook.remove()

    def _emptied(self, subject, out: Tensor) -> Tensor:
        """Embeddings (b ... c), of which those of T say nothing."""
        last = 1 if subject.kind == "sequences" else 0
        target = out[:, : out.shape[1] - last]
        axes = tuple(range(1, out.ndim - 1))
        nothing = (
            target.mean(dim=axes, keepdim=True) if self.without == "mean" else torch.zeros_like(out[:, :1])
        )
        return torch.cat([nothing.expand_as(target), out[:, out.shape[1] - last :]], dim=1)


def _decodes(leaf: Any) -> bool:
    return leaf.site.startswith("decoder")

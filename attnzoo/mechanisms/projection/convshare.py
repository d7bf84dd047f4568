"""Shared convolutions in the place of projections: every token is a small map, and all meet the same kernels.

Ibadulla et al., "ConvShareViT: Enhancing Vision Transformers with Convolutional Attention Mechanisms for Free-Space
Optical Accelerators", 2025, arXiv:2504.11517.
"""

from dataclasses import replace
from typing import Literal

from torch import nn
from torch.nn import functional as F

from attnzoo.core import Card, Family, Law, Mechanism, OptionError, Paper, PositiveInt, Site
from attnzoo.functional import dot_product_attention, merge_heads, nearest_factors, rearrange, reduce

TITLE = ("ConvShareViT: Enhancing Vision Transformers with Convolutional Attention Mechanisms for Free-Space "
         "Optical Accelerators")  # fmt: skip
Form = Literal["valid", "same", "compact", "unshared"]
USUAL = {"same": 3, "unshared": 7}
KERNELS = (  # in formulas: number and sides of the kernels; a token's map has y rows and x columns
    "for y in [max(i for i in range(1, c + 1) if c % i == 0 and i**2 <= c)] for x in [c // y] "
    "for f in [*[f for f in range(2, y + 1) if y % f == x % f == 0], 1][:1] "
    f"for i, j in [[kernel or min({USUAL}.get(form) or s - s // f + 1, 2 * s - 1) for s in (y, x)]] "
    "for number in [c // max(1, (y - i + 1) * (x - j + 1)) if form == 'compact' else 1]"
)


def kernels_of(form: str, kernel: int | None, width: int) -> tuple[int, tuple[int, int]]:
    """How many kernels give as many channels as go in, and their sides; refuses what has none."""
    rows, columns = nearest_factors(width)  # of a token's map
    if form == "valid" and kernel is None:
        return width, (rows, columns)
    if form in USUAL:
        sides = kernel or min(USUAL[form], 2 * rows - 1), kernel or min(USUAL[form], 2 * columns - 1)
        if sides[0] // 2 < rows:
            return 1, sides
    if form == "compact":
        factor = next((f for f in range(2, rows + 1) if rows % f == columns % f == 0), columns)
        sides = kernel or rows - rows // factor + 1, kernel or columns - columns // factor + 1
        left = max(0, rows - sides[0] + 1) * max(0, columns - sides[1] + 1)
        if left > 1 and width % left == 0:
            return width // left, sides
    raise OptionError(
        f"`convshare`: there are no kernels for `form: {form}` with `kernel: {kernel}` on maps of {rows} × {columns}",
        why="as many channels must come out as go in, and every tap must meet the map",
        help="`same` fits all, `valid` without `kernel`; `compact` has M kernels that leave channels / M numbers each",
    )


class ConvShare(Mechanism):
    """softmax(q kᵀ / √d) v, projected; each projection is K_m ⋆ X_i, with kernels K_m that all tokens i share.

    X_i is token i as a map of rows × columns = c; the maps that the kernels give are a token again, one after another.

    Args:
        site: Where the mechanism is put.
        form: `valid`, c kernels as large as the map: a Linear; `same`, one kernel, and zeros around the map; `compact`,
            fewer and smaller kernels without zeros; `unshared`, the first author's earlier form: a kernel for each
            token, zeros around the map, heads as wide as the tokens, whose sum is the output, and no biases.
        kernel: Side of the kernels. None takes 3 for `same`, 7 for `unshared`, half of the map or less for `compact`.

    Raises:
        OptionError: AZ214, when there are no such kernels for this width, or keys and values would be too wide.
    """

    card = Card(
        name="convshare",
        family=Family.PROJECTION,
        summary="Attention whose projections convolve each token, its channels as a map, with shared kernels.",
        equation="K_o ⋆ softmax(q kᵀ / √d) v\nq_i = K_q ⋆ X_i,  k_i = K_k ⋆ X_i,  v_i = K_v ⋆ X_i",
        paper=Paper(TITLE, "Ibadulla et al.", 2025, "arXiv:2504.11517"),
        time="n m c + n c c",
        memory="h n m + n c",
        params="(c + qkv_bias) * c + (2 * e + qkv_bias) * c + (c + proj_bias) * c",
        flops="4 * n * c**2 + 4 * m * e * c + 4 * n * m * c",
        masks={"keys", "causal", "pairs"},
        context=True,
        honours={"qkv_bias", "proj_bias"},
        taps={"scores": "b h n m", "weights": "b h n m"},
        laws={Law.STOCHASTIC, Law.PERMUTATION_EQUIVARIANT},
        fidelity="inspired",
        notes="Made from the abstract, without sizes of kernels. Maps are as square as the width allows. Keys have "
        "no bias: no softmax would see it. The paper's MLP is made of such convolutions too; here it is the host's.",
    )

    @classmethod
    def claims(cls, *, form: str, **options) -> Card:
        if form == "valid":
            return cls.card
        if form != "unshared":
            params = f"sum((4 * i * j + 2 * qkv_bias + proj_bias) * number {KERNELS})"
            flops = f"4 * n * m * c + 4 * (n + m) * c * sum(i * j {KERNELS})"
            return replace(cls.card, params=params, flops=flops)
        params = f"3 * n * h * sum(i * j {KERNELS})"
        flops = f"4 * n * m * h * c + 6 * n * h * c * sum(i * j {KERNELS})"
        card = replace(cls.card, context=False, fixed_length=True, honours=frozenset(), laws={Law.STOCHASTIC})
        return replace(card, time="h n m c", memory="h n m + h n c", params=params, flops=flops)

    def __init__(self, site: Site, *, form: Form = "valid", kernel: PositiveInt | None = None):
        super().__init__(site)
        number, sides = kernels_of(form, kernel, site.dim)
        wide = site.context_dim or site.dim
        if form != "valid" and wide != site.dim:
            raise OptionError(
                f"`convshare`: with `form: {form}` keys would have {wide} channels as the context has, not {site.dim}",
                help="choose `form: valid`",
            )
        self.form, self.rows = form, nearest_factors(site.dim)[0]
        self.pad: nn.Module = nn.Identity()
        if form in USUAL:  # an even kernel has one more tap to the right, and below
            (top, left), (below, right) = ((s - 1) // 2 for s in sides), (s // 2 for s in sides)
            self.pad = nn.ZeroPad2d((left, right, top, below))
        if form == "unshared":
            n = site.layout.length
            self.q, self.k, self.v = (
                nn.Conv2d(n, n * site.heads, sides, groups=n, bias=False) for _ in "qkv"
            )
            return
        self.head_dim, read = site.head_dim, nearest_factors(wide) if form == "valid" else sides
        self.q = nn.Conv2d(1, number, sides, bias=site.qkv_bias)
        self.k = nn.Conv2d(1, number, read, bias=False)
        self.v = nn.Conv2d(1, number, read, bias=site.qkv_bias)
        self.proj = nn.Conv2d(1, number, sides, bias=site.proj_bias)

    def mix(self, x, source, *, mask, layout):
        if self.form == "unshared":
            maps = self.pad(rearrange(x, "b n (y x) -> b n y x", y=self.rows))
            banks = self.q, self.k, self.v
            q, k, v = (rearrange(c(maps), "b (n h) y x -> b h n (y x)", h=self.heads) for c in banks)
            return reduce(dot_product_attention(self, q, k, v, mask), "b h n c -> b n c", "sum")
        q, k, v = self._project(self.q, x), self._project(self.k, source), self._project(self.v, source)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", d=self.head_dim) for t in (q, k, v))
        return self._project(self.proj, merge_heads(dot_product_attention(self, q, k, v, mask)))

    def _project(self, bank, x):
        """K ⋆ X of each token: (b n c) to (b n c)."""
        if self.form == "valid":  # one number for each kernel
            return F.linear(x, bank.weight.flatten(1), bank.bias)
        maps = bank(self.pad(rearrange(x, "b n (y x) -> (b n) 1 y x", y=self.rows)))
        return rearrange(maps, "(b n) m y x -> b n (m y x)", n=x.shape[1])

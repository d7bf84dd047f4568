"""
Coming from xformers, x-transformers, timm
==========================================

What you wrote there, how it is written here, and that the numbers agree wherever both can be run. timm and
PyTorch are installed with attnzoo, so they are run; x-transformers is run where it is installed. xformers
is shown as code.

The two differences that bite, first:

* **Masks.** Here a mask is boolean and True *may attend*, as in timm, x-transformers and
  :func:`torch.nn.functional.scaled_dot_product_attention`. In :class:`torch.nn.MultiheadAttention` True
  *hides*; ``attnzoo.as_mha`` keeps to that. xformers takes biases that are added to the scores.
* **Shapes.** Tokens are ``(b, n, c)`` and heads ``(b, h, n, d)``; xformers' operators want ``(b, n, h,
  d)``.
"""

from importlib.util import find_spec

import timm
import torch
from torch import nn
from torch.nn import functional as F

import attnzoo
from attnzoo.core import Layout, Mask, Site

torch.manual_seed(0)
x = torch.randn(2, 65, 64)  # (batch, tokens, channels)


def compared(what: str, theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """How far two results are from each other."""
    assert theirs.shape == ours.shape
    print(f"{what}: largest difference {(theirs - ours).abs().max():.1e}")


# %%
# timm: a layer
# -------------
# .. list-table::
#    :header-rows: 1
#    :widths: 50 50
#
#    * - there
#      - here
#    * - ``Attention(64, num_heads=4, qkv_bias=True)``
#      - ``attnzoo.create("softmax", 64, 4)``
#    * - ``attn(x, attn_mask=mask)``
#      - ``mix(x, mask=mask)``
#    * - ``qk_norm=True, norm_layer=...``
#      - ``qk_norm=True, norm_layer=...``
#    * - another mechanism: another class, other weights
#      - another name; heads keep the same four matrices
#
# The weights of ``mix.attn`` have timm's names.

from timm.models.vision_transformer import Attention

there = Attention(64, num_heads=4, qkv_bias=True).eval()
here = attnzoo.create("softmax", dim=64, heads=4).eval()
here.attn.load_state_dict(there.state_dict())

with torch.no_grad():
    compared("timm Attention", there(x), here(x))
    may = torch.rand(2, 1, 65, 65, generator=torch.Generator().manual_seed(1)) < 0.7
    may |= torch.eye(65, dtype=torch.bool)
    compared("timm Attention with a mask", there(x, attn_mask=may), here(x, mask=may))

# %%
# timm: a model
# -------------
# A recipe on a timm base *is* that timm model, with other attention: its ``forward_features``,
# ``features_only``, checkpoints, ``set_input_size`` and so on. With plain softmax it has timm's keys and
# timm's bits.

there = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=10).eval()
here = attnzoo.compose(
    {
        "recipe": 1,
        "host": {
            "kind": "vit",
            "base": "vit_tiny_patch16_224",
            "model": {"img_size": 64, "depth": 3, "num_classes": 10},
        },
        "attention": "softmax",
    }
).eval()
print(here.load_state_dict(there.state_dict()))
images = torch.randn(2, 3, 64, 64)
with torch.no_grad():
    print("equal to timm, bit for bit:", torch.equal(there(images), here(images)))

# %%
# So the change to another mechanism is one word, and timm's own training script takes it by ``attnzoo
# run``:
#
# .. code-block:: console
#
#     $ python train.py  --model vit_tiny_patch16_224 ...
#     $ attnzoo run train.py --model attnzoo_vit --model-kwargs recipe=my.yaml ...
#
# A model that is trained already is grafted instead, :doc:`03_graft_a_pretrained_vit`.
#
# PyTorch's MultiheadAttention
# ----------------------------
# ``as_mha`` has the arguments, the masks and the results of :class:`torch.nn.MultiheadAttention`, so it
# goes where one stands, also inside ``nn.TransformerEncoderLayer``. The names of its parameters are those
# of ``create``.

there = nn.MultiheadAttention(64, 4, batch_first=True).eval()
here = attnzoo.as_mha("softmax", 64, 4, batch_first=True).eval()
for old, new in (("in_proj_", "qkv."), ("out_proj.", "proj.")):
    for kind in ("weight", "bias"):
        here.attn.get_parameter(new + kind).data.copy_(there.get_parameter(old + kind))
padding = torch.zeros(2, 65, dtype=torch.bool)
padding[1, 50:] = True  # True hides, as PyTorch has it here
with torch.no_grad():
    compared("nn.MultiheadAttention", there(x, x, x)[0], here(x, x, x)[0])
    hidden = {"key_padding_mask": padding, "need_weights": False}
    compared("with padding", there(x, x, x, **hidden)[0], here(x, x, x, **hidden)[0])

# %%
# x-transformers
# --------------
# There one class has a flag for each idea; here each idea is a mechanism, and ideas are joined by fusions.
#
# .. list-table::
#    :header-rows: 1
#    :widths: 50 50
#
#    * - there
#      - here
#    * - ``Attention(dim, heads=8)``
#      - ``create("softmax", dim, 8, qkv_bias=False, proj_bias=False)``
#    * - ``causal=True``
#      - ``mask=Mask(causal=True)`` in the call; a decoder's sites do it
#    * - ``kv_heads=2``, ``one_kv_head=True``
#      - ``grouped_query`` with ``groups: 2`` or ``1``
#    * - ``pre_talking_heads=True, post_talking_heads=True``
#      - ``talking_heads``
#    * - ``sparse_topk=8``
#      - ``top_k`` with ``keep: 8``
#    * - ``qk_norm=True``
#      - ``cosine``
#    * - ``num_mem_kv=16``
#      - ``memory`` with ``slots: 16``
#    * - ``gate_values=True``
#      - ``gated_attention``
#    * - ``sigmoid=True``
#      - ``sigmoid``
#    * - ``add_zero_kv=True``, ``head_learned_sink=True``
#      - ``softmax_one``, with ``learned: true``
#    * - ``l2_distance=True``
#      - the example of :doc:`02_a_mechanism_in_one_file`
#    * - ``Encoder(..., alibi_pos_bias=True)``, ``rotary_pos_emb=True``
#      - ``alibi``; ``positions: rotary`` of the host
#
# Names that match do not make equal initialisation, defaults or details: ``attnzoo show NAME`` says which
# paper a mechanism keeps to, and what differs. The plain layer, with the same weights:

here = attnzoo.create("softmax", dim=64, heads=4, qkv_bias=False, proj_bias=False).eval()
if find_spec("x_transformers"):
    from x_transformers.x_transformers import Attention as XAttention

    there = XAttention(64, heads=4, dim_head=16).eval()
    with torch.no_grad():
        here.attn.qkv.weight.copy_(torch.cat([there.to_q.weight, there.to_k.weight, there.to_v.weight]))
        here.attn.proj.weight.copy_(there.to_out.weight)
        compared("x-transformers Attention", there(x), here(x))
else:
    print("x-transformers is not installed here: what stands above is code only")

# %%
# xformers
# --------
# ``memory_efficient_attention`` is an operator between projections, which is what a ``Head`` is. Its biases
# are masks here; a fused kernel is taken as long as nobody looks at the weights.
#
# .. list-table::
#    :header-rows: 1
#    :widths: 50 50
#
#    * - there
#      - here
#    * - ``memory_efficient_attention(q, k, v)``, ``(b, n, h, d)``
#      - ``head(q, k, v, layout=layout)``, ``(b, h, n, d)``
#    * - ``attn_bias=LowerTriangularMask()``
#      - ``mask=Mask(causal=True)``
#    * - ``attn_bias=BlockDiagonalMask.from_seqlens(...)``
#      - ``mask=Mask(keys=...)`` with padded samples
#    * - ``attn_bias=tensor`` of 0 and -inf
#      - ``mask=Mask(pairs=tensor == 0)``
#    * - ``p=0.1``
#      - ``attn_drop`` of the site or of ``create``
#    * - ``components.attention``: ``linformer``, ``nystrom``, ``favor``
#      - ``linformer``, ``nystrom``, ``performer``
#    * - ``fourier_mix``, ``lambda``, ``pooling``, ``visual``
#      - ``fourier``, ``lambda_layer``, ``pooling``, ``large_kernel``
#    * - ``local`` and ``global``
#      - ``longformer``: a window, and special tokens
#
# The call and the same here. What the operator computes, softmax(q kᵀ / √d + bias) v, is written out in
# PyTorch, so that the numbers can be compared without xformers:
#
# .. code-block:: python
#
#     from xformers.ops import LowerTriangularMask, memory_efficient_attention
#
#     out = memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask())  # (b, n, h, d)

q, k, v = torch.randn(3, 2, 65, 4, 16)  # (b, n, h, d), as xformers has them
layout = Layout(grid=(65,))
head = attnzoo.load_zoo().mechanisms.find("softmax").value(Site("here", dim=64, heads=4, layout=layout))
with torch.no_grad():
    turned = [t.transpose(1, 2) for t in (q, k, v)]  # (b, h, n, d)
    here = head(*turned, mask=Mask(causal=True), layout=layout).transpose(1, 2)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / 16**0.5
    later = torch.ones(65, 65, dtype=torch.bool).triu(1)
    written = torch.einsum("bhnm,bmhd->bnhd", scores.masked_fill(later, float("-inf")).softmax(-1), v)
    compared("softmax(q kᵀ / √d + lower triangle) v", written, here)
    compared("the same by F.scaled_dot_product_attention", F.scaled_dot_product_attention(
        *turned, is_causal=True).transpose(1, 2), here)  # fmt: skip

# %%
# What has no place here: block-sparse kernels, and biases with other numbers than 0 and -inf for every
# mechanism (``alibi`` and the windows have theirs). What has none there: a mask that a mechanism cannot
# honour is refused here, never ignored.
#
# What to read next
# -----------------
# * :doc:`01_ten_minutes`
# * :doc:`/docs/recipes`: hosts, sites, fusions
# * :doc:`/docs/transformers`: the same mechanisms as ``attn_implementation`` of Hugging Face models
# * :doc:`/docs/benchmarks`: attention layers of attnzoo beside others

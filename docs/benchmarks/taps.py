"""What taps cost a timm model: `python docs/benchmarks/taps.py [MODEL]`.

Medians of alternating forwards of the model as timm made it, a copy of it (the noise), a copy with taps that nobody
watches, one whose weights are all watched, and the model with timm's eager attention.
"""

import copy
import statistics
import sys

import timm
import torch
from timm.layers import set_fused_attn

from attnzoo.bench.speed import alternate
from attnzoo.core import watch
from attnzoo.lab.timm_models import tapped

NAME = sys.argv[1] if len(sys.argv) > 1 else "vit_base_patch16_224"
ROUNDS, BATCH = 40, 4

plain = timm.create_model(NAME, num_classes=10).eval()
set_fused_attn(False)
eager = timm.create_model(NAME, num_classes=10).eval()
set_fused_attn(True)
again, unwatched, watched = (copy.deepcopy(plain) for _ in range(3))
x = torch.randn(BATCH, *plain.pretrained_cfg["input_size"])
with torch.inference_mode(), tapped(unwatched), tapped(watched), watch(watched, "weights", lambda *_: None):
    models = {
        "as timm made it": plain,
        "noise": again,
        "taps": unwatched,
        "watched": watched,
        "eager": eager,
    }
    works = [lambda model=model: model(x) for model in models.values()]
    times = [statistics.median(each) for each in alternate(works, ROUNDS, torch.device("cpu"))]
for name, time in zip(models, times, strict=True):
    print(f"{name}: {1000 * time:.1f} ms, speed {times[0] / time:.3f}")  # noqa: T201

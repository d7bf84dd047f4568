"""How a model of each kind of host is built, and what is decided about the sources that it is made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from torch import nn

from attnzoo.core import Layout, Site
from attnzoo.core.card import ROLLOUT
from attnzoo.ejecting import sequences, vit
from attnzoo.ejecting.construction import component
from attnzoo.ejecting.expressions import call, literal, ref
from attnzoo.ejecting.modules import Symbol
from attnzoo.hosts import compact_transformer, dual, pyramid, rollout, seq2seq, sequence, timm_vit
from attnzoo.hosts.dual import DualInfo
from attnzoo.hosts.info import BackboneInfo, init_normal, undecayed
from attnzoo.hosts.pyramid import PyramidInfo
from attnzoo.hosts.seq2seq import Seq2SeqInfo
from attnzoo.hosts.sequence import SequenceInfo
from attnzoo.hosts.vision_transformer import timm_arguments
from attnzoo.recipe import Composition

PRELUDE = "attnzoo.ejecting.prelude"
TIMM = Symbol("timm")
ANY, NN, TORCH = Symbol("typing", "Any"), Symbol("torch", "nn"), Symbol("torch")


RATES = (
    "num_classes",
    "in_chans",
    "drop_rate",
    "pos_drop_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
)
"""Arguments of backbones on which nothing else hangs."""


@dataclass
class Construction:
    """How a model is built.

    Args:
        body: Lines of the function that builds it, with `changed`, arguments that shall be others.
        sample: Lines that make what the model takes, as `inputs`.
        before: What stands before the function.
        known: Conditions whose truth is known, by module.
        respelled: Patterns and what stands in their place, by module.
        attributes: Methods that people call.
        missing: Choices of the host that are not in the file; see `rewriting.absent`.
        free: Arguments that may be others than the recipe's: nothing that was decided hangs on them.
    """

    body: list[str]
    sample: list[str]
    before: list[str] = field(default_factory=list)
    known: dict[str, dict[str, bool]] = field(default_factory=dict)
    respelled: dict[str, dict[str, str]] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    free: tuple[str, ...] = RATES


def construction(composition: Composition, model: nn.Module) -> Construction:
    """How the model of a recipe is built."""
    info = composition.info
    if isinstance(info, Seq2SeqInfo):
        return _seq2seq(composition, info)
    if isinstance(info, SequenceInfo):
        return _sequence(composition, info)
    assert composition.image is not None
    host, backbone = composition.image
    if host.kind == "vit":
        made = _vit(composition, backbone, model)
    else:
        kinds: dict[str, Any] = {"cct": _cct, "dual": _dual, "pyramid": _pyramid}
        made = kinds[host.kind](composition, backbone)
    if host.init == "normal":
        last = made.body.pop()
        if last != "return model":
            made.body.append(last.replace("return ", "model = ", 1))
        made.body += [f"{ref(init_normal)}(model)", "return model"]
    return made


def _arguments(arguments: Mapping[str, Any]) -> str:
    return f"arguments: dict[str, {ref(ANY)}] = ⟪{literal(dict(arguments))}⟫"


def _images(composition: Composition, info: BackboneInfo) -> list[str]:
    """Lines that make images, and the maps that are handed over with them."""
    shape = ", ".join(map(str, info.image))
    lines = [f'inputs = {{"x": {ref(TORCH)}.randn(2, {shape})}}']
    rows = ", ".join(map(str, info.image[1:]))
    for name, kind in composition.given.items():
        made = f"randint(4, (2, {rows}))" if kind == "labels" else f"rand(2, {rows})"
        lines.append(f'inputs["{name}"] = {ref(TORCH)}.{made}')
    for name, shape_of in getattr(info, "inputs", {}).items():
        lines.append(f'inputs["{name}"] = {ref(TORCH)}.randn(2, {", ".join(map(str, shape_of))})')
    return lines


def put_pool(composition: Composition) -> list[str]:
    """The function that builds the pool, if there is one."""
    if composition.pool is None:
        return []
    made = component(composition.pool, "site")
    if composition.image is not None and composition.loaded.recipe.heads is not None:
        heads = composition.image[1].heads[-1]
        made = component(
            composition.pool, call(ref(Symbol("dataclasses", "replace")), ["site"], {"heads": heads})
        )
    kind = ref(Symbol(PRELUDE, "Pool"))
    head = f'def put_pool(site: {ref(Site)}) -> {kind}:\n    """{composition.pool}: one token of all."""'
    return [f"{head}\n    return ⟪{made}⟫"]


# -- timm's ---------------------------------------------------------------------------------------------------------


def _vit(composition: Composition, info: BackboneInfo, model: nn.Module) -> Construction:
    arguments = timm_arguments(info.base, info.arguments)
    layout = f"LAYOUT = {literal(Layout(info.layout.grid, info.layout.prefix))}"
    before = [f'{layout}\n"""How the tokens of an image are arranged."""']
    sample = _images(composition, info)
    rolls = any(ROLLOUT in plan.card.given for plan in composition.everything)
    special = composition.skip or composition.pool or composition.given or info.dynamic or info.patch_drop
    distilled = type(info.model).__name__ == "VisionTransformerDistilled"
    post = any(type(block).__name__ == "ResPostBlock" for block in info.model.blocks)  # type: ignore[union-attr]
    made = Construction([_arguments(arguments)], sample, before)
    if not (special or rolls or info.attention):
        return _plain_vit(model, info, made, distilled, post)
    attention = str(info.depth)
    if info.attention:
        usual = {one.name: one.default for one in fields(Site)}
        asked = [
            literal({word: value for word, value in one.items() if value != usual[word]})
            for one in info.attention
        ]
        alike = len(set(asked)) == 1
        said = f"({asked[0]},) * {info.depth}" if alike else f"({', '.join(asked)},)"
        made.before.append(f'ATTENTION = ⟪{said}⟫\n"""What the attention of each block is asked for."""')
        attention = "ATTENTION"
        made.free = tuple(name for name in RATES if name not in ("proj_drop_rate", "attn_drop_rate"))
    options = {
        "given": composition.given,
        "skip": composition.skip,
        "dynamic": info.dynamic,
        "drops": info.patch_drop > 0,
    }
    parts = [literal(info.base), "put", "LAYOUT", attention, "arguments | changed"]
    parts += ["pool=put_pool"] if composition.pool else []
    parts += [f"{name}={literal(value)}" for name, value in options.items() if value]
    function = vit.composed_eva if info.attention else vit.composed
    made.body.append(f"return ⟪{ref(function)}({', '.join(parts)})⟫")
    made.known = _decided_of(composition, info, rolls)
    made.respelled[vit.__name__] = {
        **({r"\bZooPreNormBlock\b": "ZooResPostBlock"} if post else {}),
        **({r"\bZooVisionTransformer\b": "ZooDistilled"} if distilled else {}),
    }
    if not rolls:
        made.respelled[vit.__name__] |= {r"return rolling\(model\)": "return model"}
        made.respelled[timm_vit.__name__] = {
            r"        if not asks\(component\.card\):\n            return self\.given\n.*": "        return self.given"
        }
    else:
        made.respelled[rollout.__name__] = ROLLS
    if not composition.given:
        made.respelled.setdefault(timm_vit.__name__, {})[
            r"        maps = \{\n(?:            .*\n)*        \}\n"
        ] = "        maps: dict[str, Tensor] = {}\n"
    return made


ROLLS = {
    r"card: Card": "card: Component",
    r"tapped = card\.tapped\(\"weights\"\)": (
        'tapped = {name: axes for name, axes in card.taps.items() if name.startswith("weights")}'
    ),
}
"""What the rollout asks of cards, asked of components."""


def _plain_vit(
    model: nn.Module, info: BackboneInfo, made: Construction, distilled: bool, post: bool
) -> Construction:
    """timm's model whose blocks need to know nothing of each other."""
    block = vit.SitedResPostBlock if post else vit.SitedBlock
    built = f'{ref(TIMM)}.create_model("{info.base}", block_fn=block, **(arguments | changed))'
    made.body.insert(0, f"block = {ref(partial)}({ref(block)}, put, LAYOUT, {info.depth})")
    if not undecayed(model):
        made.body.append(f"return {built}")
        return made
    made.body += [f"model = {built}", f"model.__class__ = {ref(vit.SitedModel)}", "return model"]
    if distilled:
        made.respelled[vit.__name__] = {r"\(VisionTransformer\)": "(VisionTransformerDistilled)"}
    return made


def _decided_of(composition: Composition, info: BackboneInfo, rolls: bool) -> dict[str, dict[str, bool]]:
    """What is decided about timm's models with more than mechanisms in their blocks."""
    carries = bool(composition.skip or rolls)
    choices = {"skip": bool(composition.skip), "pool": composition.pool is not None}
    ways = {
        "not self.carries": not carries,
        "self.drops": info.patch_drop > 0,
        "not dynamic": not info.dynamic,
        "self.dynamic_img_size": info.dynamic,
        "component is None": composition.pool is None,
    }
    return {
        vit.__name__: choices,
        timm_vit.__name__: {
            name: holds for name, holds in ways.items() if name != "component is None" or holds
        },
    }


# -- the zoo's own --------------------------------------------------------------------------------------------------

PUT_IS_SAID = {
    r"\(put or put_plain\)\(": "put(",
    r"        put: Put(?: \| None = None| = plain_attention),\n": "        *,\n        put: Put,\n",
    r"; plain attention if None": "",
}
"""Without the plain attention that stands in when nothing is put."""
UNSKIPPED = {
    r"x, handed = carried\(layer, handed, (.*)\)": r"x = layer(\1)",
    r"        handed = None\n": "",
    r"mask, layout, handed = (.*), None": r"mask, layout = \1",
    r", skip: Skip": "",
    r"        skip: What layers hand on\.\n": "",
}
"""Where layers hand nothing on."""


def _own(
    composition: Composition, info: BackboneInfo, model: type, bases: Any, more: Mapping[str, str]
) -> Construction:
    """A backbone of the zoo's own: its class, with the arguments of its base."""
    arguments = {**bases[info.base], **info.arguments}
    parts = ["put=put"]
    if composition.pool:
        arguments["global_pool"] = "pool"
        parts.append("pool=put_pool")
    parts += [f"{name}={value}" for name, value in more.items()]
    body = [_arguments(arguments), f"return ⟪{ref(model)}({', '.join(parts)}, **(arguments | changed))⟫"]
    module = model.__module__
    return Construction(
        body,
        _images(composition, info),
        known={} if composition.pool else {module: {"isinstance(self.pool, Pool)": False}},
        respelled={module: dict(PUT_IS_SAID)},
        attributes={"set_grad_checkpointing"},
    )


def _cct(composition: Composition, info: BackboneInfo) -> Construction:
    more = {"given": literal(composition.given)} if composition.given else {}
    return _own(composition, info, compact_transformer.CompactTransformer, compact_transformer.BASES, more)


def _dual(composition: Composition, info: DualInfo) -> Construction:
    more = {
        name: literal(sites)
        for name, sites in (("left_out", info.left_out), ("beside", info.beside))
        if sites
    }
    made = _own(composition, info, dual.DualTransformer, dual.BASES, more)
    made.respelled[dual.__name__] |= {
        r"        b: Mapping\[str, Any\] = BASES.*\n        \*,\n": "        *,\n        b: Mapping[str, Any],\n",
        r"        for name in self\.inputs:\n            _check_name\(name\)\n": "",
    }
    said = {**dual.BASES[info.base], **info.arguments}["b"]["stream"]
    made.missing = {f"stream == '{one}'" for one in ("scale", "features", "tokens", "given") if one != said}
    return made


CHOICES = {
    "stem": ("kind", ("overlap", "conv")),
    "merge": ("kind", ("deformable",)),
    "mlp": ("kind", ("plain", "multi_group", "depthwise")),
    "block": ("block", ("bottleneck", "frequency")),
}
"""What functions of `stages` are asked for, by the argument of the host, with the words that stand in an `if`."""


def _pyramid(composition: Composition, info: PyramidInfo) -> Construction:
    more = {"left_out": literal(info.left_out)} if info.left_out else {}
    made = _own(composition, info, pyramid.PyramidTransformer, pyramid.BASES, more)
    made.free = tuple(name for name in RATES if name != "pos_drop_rate")
    said = {"stem": "overlap", "merge": "overlap", "mlp": "plain", "block": "transformer"}
    said |= {**pyramid.BASES[info.base], **info.arguments}
    made.missing = {
        f"{variable} == '{word}'"
        for argument, (variable, words) in CHOICES.items()
        for word in words
        if word not in (said[argument], said["stem"])
    }
    if said["merge"] != "deformable":
        made.respelled[pyramid.__name__] |= {
            r"        for module in self\.modules\(\):\n            if isinstance\(module, DeformableMerge\):\n.*\n": ""
        }
    return made


def _form(form: Any) -> str:
    return f"form = {ref(type(form))}(**(⟪{literal(vars(form))}⟫ | changed))"


def _sequence(composition: Composition, info: SequenceInfo) -> Construction:
    parts = ["form", f"{ref(sequences.layers_of)}(form, {literal(tuple(info.heads))})", "put"]
    parts += [literal(composition.skip)] if composition.skip else []
    before: list[str] = []
    if composition.pool:
        site = f"{ref(sequences.pool_site)}(form, {literal(info.heads[-1])})"
        parts.append(f"pool=put_pool({site})")
    form = info.form
    length = min(form.max_length, 16)
    made = f"randint({form.vocab}, (2, {length}))" if form.vocab else f"randn(2, {length}, {form.width})"
    body = [
        f"arguments: dict[str, {ref(ANY)}] = ⟪{literal(vars(form))}⟫",
        f"form = {ref(type(form))}(**(arguments | changed))",
        f"return ⟪{ref(sequence.SequenceModel)}({', '.join(parts)})⟫",
    ]
    free = ("vocab" if form.vocab else "width", "outputs", "dropout")
    result = Construction(body, [f'inputs = {{"x": {ref(TORCH)}.{made}}}'], before, free=free)
    return _unskipped(composition, result, sequence.__name__)


def _unskipped(composition: Composition, made: Construction, module: str) -> Construction:
    if not composition.skip:
        made.known[module] = {"skip": False}
        made.respelled[module] = dict(UNSKIPPED)
    return made


def _seq2seq(composition: Composition, info: Seq2SeqInfo) -> Construction:
    heads = [literal(tuple(side)) for side in (info.encoder_heads, info.decoder_heads)]
    parts = ["form", f"{ref(sequences.sides_of)}(form, {', '.join(heads)})", "put"]
    parts += [literal(composition.skip)] if composition.skip else []
    form = info.form
    length = min(form.max_length, 8)
    body = [
        f"arguments: dict[str, {ref(ANY)}] = ⟪{literal(vars(form))}⟫",
        f"form = {ref(type(form))}(**(arguments | changed))",
        f"return ⟪{ref(seq2seq.Seq2Seq)}({', '.join(parts)})⟫",
    ]
    sample = [
        f'inputs = {{"source": {ref(TORCH)}.randint(3, {form.source}, (2, {length}))}}',
        f'inputs["target"] = {ref(TORCH)}.randint(3, {form.target}, (2, {length}))',
    ]
    made = Construction(body, sample, attributes={"start", "step", "encode", "decode", "select"})
    made.free = ("source", "target", "dropout")
    return _unskipped(composition, made, seq2seq.__name__)


def projections_of(sites: Sequence[Site]) -> dict[str, str]:
    """What `MultiHead` need not remember, once all sites are known: patterns and what stands in their place."""
    known = known_of(sites)
    gone = {
        rf"        self\.{word} = site\.{word}\n": ""
        for word in ("rotary", "qkv_fused", "k_bias")
        if f"self.{word}" in known
    }
    if known.get("self.k_bias"):
        gone[r"    [qv]_bias: nn\.Parameter\n"] = ""
    return gone


def known_of(sites: Sequence[Site]) -> dict[str, bool]:
    """What is decided about projections, once all sites are known."""
    known: dict[str, bool] = {}

    def decide(says: Callable[[Site], bool], yes: Sequence[str], no: Sequence[str] = ()) -> None:
        said = {says(site) for site in sites}
        if len(said) == 1:
            holds = said.pop()
            known.update(dict.fromkeys(yes, holds) | dict.fromkeys(no, not holds))

    decide(
        lambda site: site.context_dim is None, ["self.context_dim is None"], ["site.context_dim is not None"]
    )
    for word in ("qkv_fused", "k_bias", "rotary"):
        decide(lambda site, word=word: getattr(site, word), [f"site.{word}", f"self.{word}"])
    for word in ("qk_norm", "scale_norm"):
        decide(lambda site, word=word: getattr(site, word), [f"site.{word}"])
    return known

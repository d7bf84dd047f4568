"""Random recipes: everything that the grammar of recipes allows, at sizes that compose in a moment.

Not every draw holds: mechanisms are put where they cannot be, which composing must say before anything is built.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hypothesis import strategies as st

from attnzoo.core import Pool
from attnzoo.testing.strategies import settings_of
from attnzoo.zoo import load_zoo

T = TypeVar("T")
Choose = Callable[[Sequence[T]], T]
"""Takes one of several; the first is the simplest."""
Settings = Callable[[Any], Sequence[dict[str, Any]]]
"""The options that a class may be given, as far as they differ from their defaults."""

HOSTS = ("vit", "cct", "pyramid", "dual", "seq2seq", "sequence")
DEPTH = 2
"""So often fusions may be nested."""
SKIPS = ("merged", "merged_raw", "merged_post", "probs_pairmean", "logits_pairmean", "cross", "encoder_stack")


def recipes(
    hosts: Sequence[str] = HOSTS, mechanisms: Sequence[str] | None = None
) -> st.SearchStrategy[dict[str, Any]]:
    """Random recipes, as mappings that `attnzoo.compose` takes; they shrink to one mechanism in a plain ViT.

        @given(attnzoo.testing.recipes())
        def test_it_composes_or_says_why_not(recipe): ...

    Args:
        hosts: Kinds of host: vit, cct, pyramid, dual, seq2seq, sequence.
        mechanisms: Names of what is put at the sites; all of the zoo when None.
    """

    @st.composite
    def drawn(draw: st.DrawFn) -> dict[str, Any]:
        return random_recipe(lambda values: draw(st.sampled_from(list(values))), hosts, mechanisms)

    return drawn()


def random_recipe(
    choose: Choose | random.Random, hosts: Sequence[str] = HOSTS, mechanisms: Sequence[str] | None = None
) -> dict[str, Any]:
    """One random recipe.

    Args:
        choose: What takes one of several, or a source of random numbers.
        hosts: Kinds of host.
        mechanisms: Names of what is put at the sites; all of the zoo when None.
    """
    take: Choose = choose.choice if isinstance(choose, random.Random) else choose
    kind = take(hosts)
    host, globs = _HOSTS[kind](take)
    names = list(mechanisms) if mechanisms is not None else _names()
    recipe = {"recipe": 1, "host": {"kind": kind} | host} | random_attention(take, kind, globs, names)
    if take((False, False, True)):
        recipe["heads"] = take((2, [4, 2], {"schedule": "halving", "first": 4}))
    return recipe


def random_attention(
    choose: Choose | random.Random,
    kind: str,
    globs: Sequence[str],
    mechanisms: Sequence[str] | None = None,
    settings: Settings = settings_of,
) -> dict[str, Any]:
    """What a recipe says beside its host: `attention`, and perhaps `overrides`, `skip` and `pool`.

    Args:
        choose: What takes one of several, or a source of random numbers.
        kind: Of the host.
        globs: Over its sites, for overrides.
        mechanisms: Names of what is put at the sites; all of the zoo when None.
        settings: Options that a mechanism or fusion may be given.
    """
    take: Choose = choose.choice if isinstance(choose, random.Random) else choose
    names = list(mechanisms) if mechanisms is not None else _names()
    said: dict[str, Any] = {"attention": _spec(take, names, DEPTH, settings)}
    for _ in range(take((0, 0, 1, 2))):
        empty = kind in ("pyramid", "dual") and take((False, False, True))
        put = None if empty else _spec(take, names, 1, settings)
        said.setdefault("overrides", []).append({"at": take(globs), "put": put})
    if take((False, False, False, True)):
        said["skip"] = take((*SKIPS, {"use": "merged", "at": globs[-1]}))
    if take((False, False, False, True)):
        said["pool"] = take(_names(pools=True))
    return said


def _names(pools: bool = False) -> list[str]:
    entries = load_zoo().mechanisms.values()
    names = sorted(entry.name for entry in entries if issubclass(entry.value, Pool) == pools)
    return [*(name for name in ("softmax",) if name in names), *(name for name in names if name != "softmax")]


def _spec(take: Choose, names: Sequence[str], depth: int, settings: Settings) -> Any:
    """A mechanism with options, or a fusion of specs."""
    zoo = load_zoo()
    if depth == 0 or take((True, True, False)):
        name = take(names)
        options = take(settings(zoo.mechanisms[name].value)) if name in zoo.mechanisms else {}
        spec = {"use": name, "with": options} if options else name
        if not take((False,) * 7 + (True,)):
            return spec
        return (spec if isinstance(spec, dict) else {"use": name}) | {"heads": 2}
    fusion = take(sorted(zoo.fusions))
    cls = zoo.fusions[fusion].value
    fewest, most = cls.card.arity
    count = take(range(max(1, fewest), 1 + (3 if most is None else max(fewest, min(most, 3)))))
    fused: dict[str, Any] = {
        "fuse": fusion,
        "of": [_spec(take, names, depth - 1, settings) for _ in range(count)],
    }
    if options := take(settings(cls)):
        fused["with"] = options
    if level := take((None, None, "heads", "tokens")):
        fused["level"] = level
    return fused


def _some(take: Choose, **choices: Sequence[Any]) -> dict[str, Any]:
    """Arguments that are said one time in three."""
    return {name: take(values) for name, values in choices.items() if take((False, False, True))}


def _vit(take: Choose) -> tuple[dict[str, Any], tuple[str, ...]]:
    base = take(("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"))
    model = {"img_size": take((16, 24)), "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 4}
    if base.startswith("vit"):
        model |= _some(
            take, global_pool=("avg", "token", "map"), class_token=(True, False), reg_tokens=(1, 2), qk_norm=(True,),
            norm_layer=("rmsnorm", "layernorm"), dynamic_img_size=(True,), patch_drop_rate=(0.25,),
        )  # fmt: skip
    model |= _some(
        take, qkv_bias=(False, True), init_values=(0.1,), attn_drop_rate=(0.1,), num_classes=(3, 10)
    )
    return {"base": base, "model": model}, ("blocks.0", "blocks.1", "blocks.*")


def _cct(take: Choose) -> tuple[dict[str, Any], tuple[str, ...]]:
    model = {"img_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 4, "num_classes": 10}
    model |= _some(
        take, pos_embed=("sine", "learn"), n_conv_blocks=(1,), qkv_bias=(True, False), kernel_size=(3,)
    )
    return {"model": model}, ("blocks.1", "blocks.*")


def _pyramid(take: Choose) -> tuple[dict[str, Any], tuple[str, ...]]:
    model: dict[str, Any] = {
        "img_size": 32, "patch_size": 4, "dims": [8, 16], "depths": [1, 2], "num_heads": [2, 4],
        "mlp_ratios": [2.0, 2.0], "num_classes": 10,
    }  # fmt: skip
    model |= _some(
        take, stem=("overlap", "conv", "patch"), merge=("overlap", "deformable", "patch"), norm=("group", "layer"),
        block=("bottleneck", "frequency", "transformer"), mlp=("depthwise", "inverted", "plain", "multi_group"),
        pos_embed=("learn", "none"), shared=(True,), depthwise=(True,),
    )  # fmt: skip
    return {"model": model}, ("stages.0.*", "stages.1.1", "stages.*.*")


def _dual(take: Choose) -> tuple[dict[str, Any], tuple[str, ...]]:
    stream = take((
        {"stream": "scale", "patch_size": 16}, {"stream": "pair"}, {"stream": "features"},
        {"stream": "tokens", "count": 3}, {"stream": "given", "channels": 5, "size": [2, 2]},
    ))  # fmt: skip
    model = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 4,
        "num_classes": 10,
        "b": stream,
    }
    model |= _some(take, class_token=(True, False), global_pool=("avg", "token"), init_values=(0.1,))
    return {"model": model}, ("a.*.cross", "b.*.cross", "b.*.*", "a.0.self")


def _seq2seq(take: Choose) -> tuple[dict[str, Any], tuple[str, ...]]:
    host: dict[str, Any] = {"dim": 16, "mlp_dim": 16, "layers": 2, "vocab": 11, "max_length": 12}
    host |= _some(
        take, positions=("rotary", "learned", "none"), norm_first=(False, True), tie=("all", "target"),
        norm=("scalar", "layer"), bias=(False,),
    )  # fmt: skip
    return host, ("decoder.*.self", "decoder.*.cross", "encoder.*", "encoder.0")


def _sequence(take: Choose) -> tuple[dict[str, Any], tuple[str, ...]]:
    host: dict[str, Any] = {
        "dim": 16,
        "mlp_dim": 16,
        "layers": 2,
        "vocab": 11,
        "max_length": 12,
        "outputs": 5,
    }
    host |= _some(take, positions=("rotary", "sinusoidal", "none"), causal=(False, True), norm_first=(False,))
    return host, ("layers.0", "layers.*")


_HOSTS: dict[str, Callable[[Choose], tuple[dict[str, Any], tuple[str, ...]]]] = {
    "vit": _vit,
    "cct": _cct,
    "pyramid": _pyramid,
    "dual": _dual,
    "seq2seq": _seq2seq,
    "sequence": _sequence,
}
"""What a recipe says of its host, and globs over its sites."""

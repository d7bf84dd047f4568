"""Bad recipes: every fault is found at once, at its line and column, in plain words.

A `⟦` in a text marks where a fault is expected; it is taken out before the text is read. The faults are given in the
order of the text as `CODE part of the message, reason or help`.
"""

import copy
import os
import random
import re
import string
import threading
import time

import numpy as np
import processes
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.modules.module import _global_parameter_registration_hooks
from typer.testing import CliRunner

from attnzoo.cli.app import app
from attnzoo.core import options_of
from attnzoo.errors import RecipeError, ZooError
from attnzoo.hosts.info import training_bytes, unallocated
from attnzoo.recipe import compose, compose_file, load
from attnzoo.recipe.faults import _fields
from attnzoo.recipe.schema import (
    CctHost,
    CctModel,
    DualHost,
    DualModel,
    Expect,
    Fuse,
    Override,
    PyramidHost,
    PyramidModel,
    Recipe,
    Use,
    VitHost,
    VitModel,
)
from attnzoo.train.check import checked, train_faults
from attnzoo.zoo import load_zoo

H = "recipe: 1\nhost: {kind: vit, base: vit_tiny_patch16_224, model: {depth: 2}}\n"
A = "attention: softmax\n"
R = "recipe: 1\n"


def model(text: str) -> str:
    """A recipe with these arguments of the model."""
    return f"{R}host: {{kind: vit, base: vit_tiny_patch16_224, model: {{depth: 2, {text}}}}}\n{A}"


def host(text: str) -> str:
    """A recipe with these keys of the host."""
    return f"{R}host: {{base: vit_tiny_patch16_224, {text}}}\n{A}"


def attention(text: str) -> str:
    """A recipe with this attention."""
    return f"{H}attention: {text}\n"


def put(text: str) -> str:
    """A recipe with this override."""
    return f"{H}{A}overrides:\n  - {text}\n"


def nested(levels: int, branches: int) -> str:
    """A fusion of fusions of ... mechanisms."""
    return (
        f"{{fuse: add, of: [{', '.join([nested(levels - 1, branches)] * branches)}]}}" if levels else "soft"
    )


KEYS = {
    "top_unknown": (f"{H}{A}⟦colour: red\n", "AZ110 the keys here are `recipe`"),
    "top_misspelt_attention": (f"{H}⟦attenton: softmax\n", "AZ110 did you mean `attention`?"),
    "top_misspelt_host": (f"{R}⟦hosts: {{kind: vit}}\n{A}", "AZ110 did you mean `host`?"),
    "top_misspelt_recipe": (f"⟦recipes: 1\n{H[10:]}{A}", "AZ110 did you mean `recipe`?"),
    "top_misspelt_overrides": (f"{H}{A}⟦override: []\n", "AZ110 did you mean `overrides`?"),
    "top_misspelt_summary": (f"{H}{A}⟦sumary: x\n", "AZ110 did you mean `summary`?"),
    "top_misspelt_expect": (f"{H}{A}⟦expects: {{params: 3}}\n", "AZ110 did you mean `expect`?"),
    "top_upper_case": (f"{H}⟦Attention: softmax\n", "AZ110 did you mean `attention`?"),
    "top_number_as_key": (f"{H}{A}⟦1: softmax\n", "AZ110 unknown key `1`"),
    "top_true_as_key": (f"{H}{A}⟦true: softmax\n", "AZ110 unknown key `true`"),
    "top_no_space": (f"{H}attention: {{⟦use:softmax}}\n", "AZ110 write a space after the colon"),
    "host_unknown": (host("kind: vit, ⟦size: 3"), "AZ110 in `host`"),
    "host_misspelt_base": (f"{R}host: {{kind: vit, ⟦bas: x}}\n{A}", "AZ110 did you mean `base`?"),
    "host_misspelt_model": (host("kind: vit, ⟦modle: {depth: 2}"), "AZ110 did you mean `model`?"),
    "host_misspelt_kind": (host("⟦knid: vit"), "AZ110 did you mean `kind`?"),
    "host_model_key": (host("kind: vit, ⟦depth: 2"), "AZ110 `depth` stands under `host: model:`"),
    "host_top_key": (host("kind: vit, ⟦summary: x"), "AZ110 `summary` stands at the top of the recipe"),
    "host_cct_model_key": (
        f"{R}host: {{kind: cct, ⟦n_conv_blocks: 2}}\n{A}",
        "AZ110 stands under `host: model:`",
    ),
    "host_vit_key_of_cct": (host("kind: vit, ⟦n_conv_blocks: 2"), "AZ110 the keys here are `kind`, `base`"),
    "model_vit_key_of_cct": (model("⟦n_conv_blocks: 2"), "AZ110 the keys here are `img_size`, `patch_size`"),
    "model_cct_key_of_vit": (f"{R}host: {{kind: cct, model: {{⟦patch_size: 4}}}}\n{A}", "AZ110 `host.model`"),
    "model_cct_misspelt": (
        f"{R}host: {{kind: cct, model: {{⟦n_conv_block: 4}}}}\n{A}",
        "AZ110 did you mean `n_conv_blocks`?",
    ),
    "top_model_key": (f"{H}{A}⟦embed_dim: 48\n", "AZ110 `embed_dim` stands under `host: model:`"),
    "top_host_key": (f"{H}{A}⟦registers: a\n", "AZ110 `registers` stands under `host:`"),
    "top_expect_key": (f"{H}{A}⟦params: 5\n", "AZ110 `params` stands under `expect:`"),
    "model_unknown": (model("⟦colour: 1"), "AZ110 unknown key `colour` in `host.model`"),
    "model_misspelt": (model("⟦embed_dims: 48"), "AZ110 did you mean `embed_dim`?"),
    "model_misspelt_rate": (model("⟦drop_pathrate: 0.1"), "AZ110 did you mean `drop_path_rate`?"),
    "model_host_key": (model("⟦mean: [0.5]"), "AZ110 `mean` stands under `host:`"),
    "use_misspelt": (attention("{⟦us: softmax}"), "AZ110 did you mean `use`?"),
    "use_misspelt_with": (attention("{use: soft, ⟦wiht: {variant: gated}}"), "AZ110 did you mean `with`?"),
    "use_misspelt_heads": (attention("{use: softmax, ⟦head: 3}"), "AZ110 did you mean `heads`?"),
    "use_python_name_of_with": (attention("{use: soft, ⟦with_: {}}"), "AZ110 did you mean `with`?"),
    "use_option_outside_with": (
        attention("{use: soft, ⟦variant: gated}"),
        "AZ110 options stand under `with:`",
    ),
    "fuse_misspelt": (attention("{⟦fus: add, of: [softmax]}"), "AZ110 did you mean `fuse`?"),
    "fuse_misspelt_of": (attention("{fuse: add, ⟦off: [softmax]}"), "AZ110 did you mean `of`?"),
    "fuse_misspelt_level": (
        attention("{fuse: add, of: [softmax], ⟦levl: heads}"),
        "AZ110 did you mean `level`?",
    ),
    "nested_misspelt": (attention("{fuse: add, of: [softmax, {⟦ues: soft}]}"), "AZ110 in `attention.of.1`"),
    "override_unknown": (
        put("{at: blocks.0, put: softmax, ⟦why: x}"),
        "AZ110 unknown key `why` in `overrides.0`",
    ),
    "override_misspelt": (put("{at: blocks.0, ⟦puts: softmax}"), "AZ110 did you mean `put`?"),
    "expect_unknown": (f"{H}{A}expect: {{⟦param: 3}}\n", "AZ110 did you mean `params`?"),
    "markup_in_key": (f"{H}{A}⟦'[bold]x': 3\n", "AZ110 `[bold]x`"),
    "html_in_key": (f"{H}{A}⟦<script>: 3\n", "AZ110 `<script>`"),
    "very_long_key": (f"{H}{A}⟦{'k' * 900}: 3\n", "AZ110 unknown key"),
    "hebrew_key": (f"{H}{A}⟦שלום: 3\n", "AZ110 unknown key `שלום`"),
}
MISSING = {
    "only_recipe": ("⟦⟦recipe: 1\n", "AZ111 `host` is missing", "AZ111 `attention` is missing"),
    "no_recipe": (f"⟦host: {{kind: vit}}\n{A}", "AZ111 add `recipe: 1`"),
    "no_attention": (f"⟦{H}", "AZ111 add `attention: softmax`"),
    "no_kind": (f"{R}⟦host: {{base: vit_tiny_patch16_224}}\n{A}", "AZ111 `kind` is missing in `host`"),
    "no_of": (f"{H}⟦attention: {{fuse: add}}\n", "AZ111 `of` is missing in `attention`"),
    "no_fuse": (f"{H}⟦attention: {{of: [softmax]}}\n", "AZ111 `fuse` is missing in `attention`"),
    "no_at": (put("⟦{put: softmax}"), "AZ111 `at` is missing in `overrides.0`"),
    "no_put": (put("⟦{at: blocks.0}"), "AZ111 `put` is missing in `overrides.0`"),
    "attention_empty": (f"{H}attention:⟦\n", "AZ114 nothing stands here"),
    "attention_mapping_empty": (attention("⟦{}"), "AZ114 a mapping without keys"),
    "host_empty": (f"{R}host:⟦\n{A}", "AZ112 nothing stands here"),
}
TYPES = {
    "depth_text": (model("⟦num_heads: 3").replace("depth: 2", "depth: ⟦two").replace("⟦num", "num"), "AZ112 a whole number from 1 to 96; this is the text `two`"),
    "dim_quoted": (model('embed_dim: ⟦"192"'), "AZ112 write it without quotes: 192"),
    "dim_fraction": (model("embed_dim: ⟦19.5"), "AZ112 whole number from 1 to 8192; this is 19.5"),
    "dim_whole_float": (model("embed_dim: ⟦192.0"), "AZ112 this is 192.0"),
    "dim_list": (model("embed_dim: ⟦[192]"), "AZ112 this is [192]"),
    "dim_mapping": (model("embed_dim: ⟦{a: 1}"), "AZ112 a mapping with `a`"),
    "dim_bool": (model("embed_dim: ⟦true"), "AZ112 this is true"),
    "dim_sexagesimal": (model("embed_dim: ⟦12:30:45"), "AZ112 this is the text `12:30:45`"),
    "dim_hex": (model("embed_dim: ⟦0x10"), "AZ112 this is the text `0x10`"),
    "bool_no": (model("qkv_bias: ⟦no"), "AZ112 `no` is text here: write false"),
    "bool_yes": (model("qkv_bias: ⟦yes"), "AZ112 `yes` is text here: write true"),
    "bool_on": (model("qkv_bias: ⟦on"), "AZ112 `on` is text here: write true"),
    "bool_off": (model("qkv_bias: ⟦OFF"), "AZ112 `OFF` is text here: write false"),
    "bool_quoted": (model("qkv_bias: ⟦'true'"), "AZ112 write it without quotes: true"),
    "bool_one": (model("qkv_bias: ⟦1"), "AZ112 must be `true` or `false`; this is 1"),
    "rate_text": (model("drop_rate: ⟦'0.1'"), "AZ112 write it without quotes: 0.1"),
    "rate_bool": (model("drop_rate: ⟦false"), "AZ112 this is false"),
    "img_size_text": (model("img_size: ⟦big"), "AZ112 a whole number from 1 to 4096 or a list of 2 entries, each a whole number"),
    "img_size_float": (model("img_size: ⟦32.5"), "AZ112 this is 32.5"),
    "img_size_mapping": (model("img_size: ⟦{int: 3}"), "AZ112 this is a mapping with `int`"),
    "name_number": (f"{H}{A}name: ⟦5\n", 'AZ112 write it in quotes: "5"'),
    "name_bool": (f"{H}{A}name: ⟦true\n", 'AZ112 write it in quotes: "true"'),
    "summary_list": (f"{H}{A}summary: ⟦[a, b]\n", 'AZ112 this is ["a", "b"]'),
    "summary_number": (f"{H}{A}summary: ⟦3.5\n", 'AZ112 write it in quotes: "3.5"'),
    "source_null": (f"{H}{A}source: ⟦null\n", "AZ112 nothing stands here"),
    "extends_number": (f"{H}{A}extends: ⟦5\n", "AZ112 `extends` must be text"),
    "host_text": (f"{R}host: ⟦vit\n{A}", "AZ112 `host` must be a mapping"),
    "host_list": (f"{R}host:\n  ⟦- kind: vit\n{A}", "AZ112 `host` must be a mapping"),
    "model_list": (host("kind: vit, model: ⟦[depth, 2]"), "AZ112 `host.model` must be a mapping"),
    "base_number": (f"{R}host: {{kind: vit, base: ⟦5}}\n{A}", "AZ112 `host.base` must be the name of a timm model"),
    "mean_number": (host("kind: vit, mean: ⟦0.5"), "AZ112 begin each entry with `- `"),
    "mean_of_text": (host("kind: vit, mean: [⟦a, 0.5]"), "AZ112 `host.mean.0` must be a number from -10 to 10"),
    "attention_number": (attention("⟦5"), "AZ114 this is 5"),
    "attention_list": (attention("⟦[softmax, soft]"), "AZ114 several are merged by"),
    "attention_bool": (attention("⟦false"), "AZ114 this is false"),
    "use_number": (attention("{use: ⟦5}"), 'AZ112 write it in quotes: "5"'),
    "use_list": (attention("{use: ⟦[softmax]}"), "AZ112 `attention.use` must be the name of a component"),
    "with_list": (attention("{use: soft, with: ⟦[variant]}"), "AZ112 `attention.with` must be a mapping"),
    "with_null": (attention("{use: soft, with:⟦ }"), "AZ112 nothing stands here"),
    "heads_text": (attention("{use: softmax, heads: ⟦many}"), "AZ112 from 1 to 1024"),
    "of_text": (attention("{fuse: add, of: ⟦softmax}"), "AZ112 begin each entry with `- `"),
    "of_mapping": (attention("{fuse: add, of: ⟦{use: softmax}}"), "AZ112 a list of 1 to 16 entries"),
    "of_number_inside": (attention("{fuse: add, of: [softmax, ⟦5]}"), "AZ114 `attention.of.1`"),
    "of_null_inside": (attention("{fuse: add, of: [softmax, ⟦null]}"), "AZ114 nothing stands here"),
    "overrides_mapping": (f"{H}{A}overrides: ⟦{{at: x}}\n", "AZ112 `overrides` must be a list"),
    "override_text": (put("⟦softmax"), "AZ112 `overrides.0` must be a mapping"),
    "at_number": (put("{at: ⟦0, put: softmax}"), 'AZ112 write it in quotes: "0"'),
    "expect_number": (f"{H}{A}expect: ⟦5\n", "AZ112 `expect` must be a mapping"),
    "params_text": (f"{H}{A}expect: {{params: ⟦many}}\n", "AZ112 whole number from 0 on"),
    "recipe_bool": (f"recipe: ⟦true\n{H[10:]}{A}", "AZ112 must be `1`; this is true"),
    "recipe_float": (f"recipe: ⟦1.0\n{H[10:]}{A}", "AZ112 must be `1`; this is 1.0"),
    "heads_bool": (attention("{use: softmax, heads: ⟦true}"), "AZ112 from 1 to 1024; this is true"),
    "heads_float": (attention("{use: softmax, heads: ⟦3.0}"), "AZ112 this is 3.0"),
    "heads_of_layers_bool": (f"{H}{A}heads: [⟦true, 3]\n", "AZ112 this is true"),
    "params_bool": (f"{H}{A}expect: {{params: ⟦true}}\n", "AZ112 this is true"),
    "causal_text": (f"{R}host: {{kind: sequence, causal: ⟦\"no\"}}\n{A}", "AZ112 `no` is text here: write false"),
    "causal_number": (f"{R}host: {{kind: sequence, causal: ⟦0}}\n{A}", "AZ112 must be `true` or `false`; this is 0"),
    "layers_float": (f"{R}host: {{kind: sequence, layers: ⟦2.0}}\n{A}", "AZ112 this is 2.0"),
    "option_bool_for_number": (attention("{use: neighborhood, with: {window: ⟦true}}"), "AZ211 this is true"),
    "option_float_for_whole": (attention("{use: neighborhood, with: {window: ⟦3.0}}"), "AZ211 this is 3.0"),
    "option_number_for_bool": (attention("{use: neighborhood, with: {causal: ⟦1}}"), "AZ211 this is 1"),
    "betas_bool": (f"{H}{A}train: {{optimizer: {{betas: [0.9, ⟦true]}}}}\n", "AZ112 this is true"),
    "recipe_quoted": (f'recipe: ⟦"1"\n{H[10:]}{A}', "AZ113 write it without quotes: 1"),
    "option_text_for_number": (attention("{use: grouped_query, with: {groups: ⟦one}}"), "AZ211 `attention.with.groups` must be a whole number from 1 to 65536"),
    "option_quoted_bool": (attention("{use: neighborhood, with: {causal: ⟦no}}"), "AZ211 write false"),
    "option_number_for_choice": (attention("{use: soft, with: {variant: ⟦3}}"), "AZ212 `pooled`, `gated`, `bahdanau` or `cls_query`; this is 3"),
    "option_null_union": (attention("{use: additive, with: {hidden: ⟦[]}}"), "AZ211 whole number from 1 to 65536"),
}  # fmt: skip
RANGES = {
    "recipe_two": (f"recipe: ⟦2\n{H[10:]}{A}", "AZ113 this attnzoo reads version 1 of the format"),
    "recipe_zero": (f"recipe: ⟦0\n{H[10:]}{A}", "AZ113 must be `1`; this is 0"),
    "dim_zero": (model("embed_dim: ⟦0"), "AZ113 from 1 to 8192; this is 0"),
    "dim_huge": (model("embed_dim: ⟦8193"), "AZ113 from 1 to 8192; this is 8193"),
    "depth_negative": (host("kind: vit, model: {depth: ⟦-1}"), "AZ113 from 1 to 96; this is -1"),
    "depth_bomb": (host("kind: vit, model: {depth: ⟦1000000000}"), "AZ113 from 1 to 96; this is 1000000000"),
    "rate_one": (model("drop_rate: ⟦1"), "AZ113 from 0 to below 1; this is 1"),
    "rate_exponent": (model("drop_rate: ⟦1e3"), "AZ113 from 0 to below 1; this is 1000.0"),
    "mlp_ratio_zero": (model("mlp_ratio: ⟦0"), "AZ113 above 0 to 64; this is 0"),
    "img_size_zero": (model("img_size: ⟦0"), "AZ113 or a list of 2 entries"),
    "img_size_three": (model("img_size: ⟦[32, 32, 32]"), "AZ113 this is [32, 32, 32]"),
    "img_size_one": (model("img_size: ⟦[32]"), "AZ113 this is [32]"),
    "mean_empty": (host("kind: vit, mean: ⟦[]"), "AZ113 a list of 1 to 1024 entries"),
    "mean_far": (host("kind: vit, mean: [0.5, ⟦128, 0.5]"), "AZ113 `host.mean.1` must be a number from -10 to 10; this is 128"),
    "std_of_zeros": (host("kind: vit, std: [⟦0, ⟦0.0, 1]"), "AZ113 from 0.0001 to 10; this is 0", "AZ113 this is 0.0"),
    "std_negative": (host("kind: vit, std: [1, 1, ⟦-1]"), "AZ113 this is -1"),
    "std_tiny": (host("kind: vit, std: [⟦1e-30, 1, 1]"), "AZ113 this is 1e-30"),
    "std_of_zeros_in_cct": (f"{R}host: {{kind: cct, std: [1, ⟦0, 1]}}\n{A}", "AZ113 `host.std.1`"),
    "kind_misspelt": (host("kind: ⟦vitt"), "AZ113 did you mean `vit`?"),
    "kind_other": (host("kind: ⟦resnet"), "AZ113 must be `vit`, `cct`, `pyramid`, `dual`, `seq2seq` or `sequence`; this is the text `resnet`"),
    "kind_misspelt_cct": (f"{R}host: {{kind: ⟦ccct}}\n{A}", "AZ113 did you mean `cct`?"),
    "kernel_huge": (f"{R}host: {{kind: cct, model: {{kernel_size: ⟦99}}}}\n{A}", "AZ113 from 1 to 31; this is 99"),
    "sine_misspelt": (f"{R}host: {{kind: cct, model: {{pos_embed: ⟦sin}}}}\n{A}", "AZ113 did you mean `sine`?"),
    "init_misspelt": (host("kind: vit, init: ⟦norml"), "AZ113 did you mean `normal`?"),
    "act_misspelt": (model("act_layer: ⟦gleu"), "AZ113 did you mean `gelu`?"),
    "norm_misspelt": (model("norm_layer: ⟦rsmnorm"), "AZ113 did you mean `rmsnorm`?"),
    "pool_misspelt": (model("global_pool: ⟦tokn"), "AZ113 did you mean `token`?"),
    "level_misspelt": (attention("{fuse: add, of: [softmax], level: ⟦head}"), "AZ113 did you mean `heads`?"),
    "heads_zero": (attention("{use: softmax, heads: ⟦0}"), "AZ113 from 1 to 1024; this is 0"),
    "of_empty": (attention("{fuse: add, of: ⟦[]}"), "AZ113 a list of 1 to 16 entries"),
    "of_many": (attention(f"{{fuse: add, of: ⟦[{', '.join(['softmax'] * 17)}]}}"), "AZ113 this is a list of 17"),
    "at_empty": (put("{at: ⟦'', put: softmax}"), "AZ113 this is an empty text"),
    "name_spaces": (f"{H}{A}name: ⟦my recipe\n", "AZ113 a-z, 0-9 and _"),
    "name_path": (f"{H}{A}name: ⟦../x\n", "AZ113 this is the text `../x`"),
    "name_upper": (f"{H}{A}name: ⟦Ham\n", "AZ113 begins with a letter"),
    "registers_dash": (host("kind: vit, registers: ⟦my-vit"), "AZ113 `host.registers`"),
    "base_tag": (f"{R}host: {{kind: vit, base: ⟦vit_tiny_patch16_224.augreg}}\n{A}", "AZ113 without a tag"),
    "summary_two_lines": (f'{H}{A}summary: ⟦"a\\nb"\n', "AZ113 one line of at most 1000 characters"),
    "summary_long": (f"{H}{A}summary: ⟦{'x' * 1001}\n", "AZ113 one line"),
    "source_long": (f"{H}{A}source: ⟦{'x' * 1001}\n", "AZ113 text of 0 to 1000 characters"),
    "params_negative": (f"{H}{A}expect: {{params: ⟦-1}}\n", "AZ113 from 0 on; this is -1"),
    "number_of_digits": (model(f"embed_dim: ⟦{'9' * 5000}"), "AZ113 has 5000 digits"),
    "number_too_large": (model("drop_rate: ⟦1e999"), "AZ113 too large for a number"),
    "infinite": (model("mlp_ratio: ⟦.inf"), "AZ113 `.inf` is not a finite number"),
    "minus_infinite": (model("mlp_ratio: ⟦-.INF"), "AZ113 not a finite number"),
    "not_a_number": (model("drop_rate: ⟦.nan"), "AZ113 `.nan` is not a finite number"),
    "option_zero": (attention("{use: neighborhood, with: {window: ⟦0}}"), "AZ212 from 1 to 65536; this is 0"),
    "option_fraction": (attention("{use: squeeze_excite, with: {ratio: ⟦2}}"), "AZ212 from 0 to 1; this is 2"),
    "option_positive": (attention("{use: elu_linear, with: {eps: ⟦0}}"), "AZ212 above 0; this is 0"),
    "option_choice": (attention("{use: soft, with: {variant: ⟦poled}}"), "AZ212 did you mean `pooled`?"),
    "option_choice_fusion": (attention("{fuse: add, with: {start: ⟦idntity}, of: [softmax]}"), "AZ212 did you mean `identity`?"),
}  # fmt: skip
NAMES = {
    "mechanism_misspelt": (attention("⟦softmx"), "AZ201 did you mean `softmax`?"),
    "mechanism_use": (attention("{use: ⟦sofmax}"), "AZ201 did you mean `softmax`?"),
    "mechanism_upper": (attention("⟦Softmax"), "AZ201 did you mean `softmax`?"),
    "mechanism_unknown": (attention("⟦qqqqqq"), "AZ201 `attnzoo list mechanisms` shows all"),
    "mechanism_empty": (attention("⟦''"), "AZ113 the name of a component of the zoo"),
    "mechanism_path": (attention("⟦os.system"), "AZ201 no mechanism called `os.system`"),
    "mechanism_ansi_markup": (attention("⟦'[bold red]x'"), "AZ201 `[bold red]x`"),
    "mechanism_emoji": (attention("⟦🦓"), "AZ201 `🦓`"),
    "mechanism_long": (attention(f"⟦{'m' * 131}"), "AZ113 the name of a component"),
    "nested_misspelt_name": (attention("{fuse: add, of: [softmax, {fuse: mean, of: [⟦sft]}]}"), "AZ201 did you mean `soft`?"),
    "fusion_misspelt": (attention("{fuse: ⟦hadamrd, of: [softmax, soft]}"), "AZ201 did you mean `hadamard`?"),
    "override_misspelt_name": (put("{at: blocks.0, put: ⟦fuorier}"), "AZ201 did you mean `fourier`?"),
    "fusion_as_mechanism": (attention("⟦hadamard"), "AZ203 write `fuse: hadamard` with `of: [...]`"),
    "mechanism_as_fusion": (attention("{fuse: ⟦soft, of: [softmax]}"), "AZ203 write `use: soft`"),
    "plugin_absent": (attention("⟦nosuch/part"), "AZ205 pip install attnzoo-nosuch"),
    "plugin_misspelt": (attention("⟦atnzoo/softmax"), "AZ205 did you mean `attnzoo`?"),
    "plugin_name_misspelt": (attention("⟦attnzoo/softmx"), "AZ201 did you mean `attnzoo/softmax`?"),
    "option_unknown": (attention("{use: soft, with: {⟦varient: gated}}"), "AZ210 did you mean `variant`?"),
    "option_of_none": (attention("{use: softmax, with: {⟦window: 3}}"), "AZ210 it has none"),
    "option_of_fusion": (attention("{fuse: low_rank, with: {⟦rnk: 3}, of: [softmax, soft]}"), "AZ210 did you mean `rank`?"),
    "option_listed": (attention("{use: grouped_query, with: {⟦zzz: 3}}"), "AZ210 its options are `groups`"),
    "option_heads": (attention("{use: softmax, with: {⟦heads: 3}}"), "AZ210 `softmax` has no option `heads`"),
    "option_by_both_names": (attention("{use: soft, with: {⟦reading: gated, variant: gated}}"), "AZ217 which are one option"),
    "option_by_its_old_name": (attention("{use: soft, with: {reading: ⟦gatd}}"), "AZ212 `attention.with.reading` must be `pooled`"),
    "old_name_of_another": (attention("{use: softmax, with: {⟦reading: gated}}"), "AZ210 `softmax` has no option `reading`"),
    "use_and_fuse": (attention("{⟦use: softmax, fuse: add, of: [softmax]}"), "AZ114 `use` and `fuse` cannot stand in one spec"),
    "use_and_of": (attention("{⟦use: add, of: [softmax]}"), "AZ114 `use` and `of` cannot stand in one spec"),
    "nothing_known": (attention("⟦{mechanism: softmax}"), "AZ114 `use: NAME`, or `fuse: NAME`"),
    "base_unknown": (f"{R}host: {{kind: vit, base: ⟦vit_tiny_patch16_225}}\n{A}", "AZ301 did you mean `vit_tiny_patch16_224`?"),
    "base_resnet": (f"{R}host: {{kind: vit, base: ⟦resnet18}}\n{A}", "AZ310 it is a ResNet"),
    "base_resnet_with_depth": (f"{R}host: {{kind: vit, base: ⟦resnet18, model: {{depth: 2}}}}\n{A}", "AZ310 it is a ResNet"),
    "base_cct": (f"{R}host: {{kind: cct, base: ⟦cct_8_3x1}}\n{A}", "AZ301 did you mean `cct_7_3x1`?"),
    "base_cct_other": (f"{R}host: {{kind: cct, base: ⟦vit_tiny_patch16_224}}\n{A}", "AZ301 there are `cct_2_3x2`"),
    "base_swin": (f"{R}host: {{kind: vit, base: ⟦swin_tiny_patch4_window7_224}}\n{A}", "AZ310 not a VisionTransformer"),
}  # fmt: skip
COMPOSING = {
    "no_such_site": (put("{at: ⟦blocks.7, put: softmax}"), "AZ304 the sites are blocks.0, blocks.1"),
    "no_such_glob": (put('{at: ⟦"encoder.*", put: softmax}'), "AZ304 `blocks.*` means all"),
    "heads_do_not_divide": (attention("{use: ⟦softmax, heads: 5}"), "AZ308 5 heads do not divide a width of 192"),
    "cct_heads_do_not_divide": (
        f"{R}host: {{kind: cct, model: {{num_heads: ⟦5}}}}\n{A}", "AZ308 5 heads do not divide a width of 256",
    ),
    "cct_without_attention": (
        f"{R}host: {{kind: cct, model: ⟦{{n_conv_blocks: 7}}}}\n{A}", "AZ309 one or more must attend",
    ),
    "cct_site_in_the_conv_front": (
        f"{R}host: {{kind: cct, model: {{n_conv_blocks: 5}}}}\n{A}overrides: [{{at: ⟦blocks.4, put: softmax}}]\n",
        "AZ304 the sites are blocks.5, blocks.6",
    ),
    "host_heads_do_not_divide": (model("num_heads: ⟦5"), "AZ308 5 heads do not divide a width of 192"),
    "host_width_not_divided": (model("embed_dim: ⟦100"), "AZ308 3 heads do not divide a width of 100"),
    "norm_eps_without_layernorm": (host("kind: vit, model: ⟦{norm_eps: 0.1, norm_layer: rmsnorm}"), "AZ309 `norm_eps` belongs to"),
    "image_smaller_than_a_patch": (model("img_size: ⟦8"), "AZ320 an image of 8 × 8 pixels holds no patch of 16 × 16"),
    "side_smaller_than_a_patch": (model("img_size: ⟦[224, 15]"), "AZ320 an image of 224 × 15 pixels"),
    "patch_larger_than_the_image": (model("patch_size: ⟦300"), "AZ320 let `img_size` be 300 or more"),
    "small_dynamic_image": (model("img_size: ⟦15, dynamic_img_size: true, dynamic_img_pad: true"), "AZ320 holds no patch"),
    "dynamic_image_that_cannot_be_cut": (model("img_size: ⟦100, dynamic_img_size: true"), "AZ320 write `dynamic_img_pad: true` too"),
    "padded_image_of_one_size": (model("img_size: ⟦100, dynamic_img_pad: true"), "AZ320 write `dynamic_img_size: true` too"),
    "token_without_a_class_token": (
        host("kind: vit, model: ⟦{class_token: false}"), "AZ309 write `global_pool: avg`, or leave `class_token: false` out",
    ),
    "registers_without_a_class_token": (
        host("kind: vit, model: ⟦{class_token: false, reg_tokens: 4, global_pool: token}"), "AZ309 write `global_pool: avg`",
    ),
    "mean_of_one": (host("kind: vit, mean: ⟦[0.5]"), "AZ321 the length of `host.mean` is 1, the number of channels 3"),
    "std_of_four": (host("kind: vit, std: ⟦[1, 1, 1, 1]"), "AZ321 the length of `host.std` is 4, the number of channels 3"),
    "mean_and_std_of_colours_in_grey": (
        host("kind: vit, mean: ⟦[0, 0, 0], std: ⟦[1, 1, 1], model: {in_chans: 1}"),
        "AZ321 the number of channels 1", "AZ321 write one number for each channel",
    ),
    "mean_of_cct": (f"{R}host: {{kind: cct, mean: ⟦[0.5, 0.5]}}\n{A}", "AZ321 the length of `host.mean` is 2"),
    "arity_of_difference": (attention("{fuse: ⟦difference, of: [softmax]}"), "AZ312 it was given 1"),
    "arity_nested": (attention("{fuse: add, of: [softmax, {fuse: ⟦difference, of: [soft]}]}"), "AZ312 it was given 1"),
    "groups_do_not_divide": (attention("{use: ⟦grouped_query, with: {groups: 2}}"), "AZ214 2 groups do not divide 3 heads"),
    "stride_beyond_window": (attention("{use: ⟦neighborhood, with: {window: 3, stride: 4}}"), "AZ214 neighborhood"),
    "tokens_inside_heads": (attention("{fuse: add, level: heads, of: [softmax, ⟦squeeze_excite]}"), "AZ303 write `level: tokens`"),
    "own_heads_inside_heads": (attention("{fuse: add, of: [softmax, {use: ⟦soft, heads: 1}]}"), "AZ303 its own number of heads"),
    "grid_with_patch_drop": (
        f"{R}host: {{kind: vit, base: vit_tiny_patch16_224, model: {{patch_drop_rate: 0.5}}}}\nattention: ⟦neighborhood\n",
        "AZ302 `neighborhood` needs every token in its place",
    ),
    "order_with_patch_drop": (
        f"{R}host: {{kind: vit, base: vit_tiny_patch16_224, model: {{patch_drop_rate: 0.5}}}}\nattention: ⟦fourier\n",
        "AZ302 `fourier` may depend on the order of the tokens; `patch_drop_rate` drops some in training and shuffles",
    ),
    "window_with_patch_drop": (
        f"{R}host: {{kind: vit, base: vit_tiny_patch16_224, model: {{patch_drop_rate: 0.01}}}}\n"
        "attention: {fuse: mean, level: tokens, of: [softmax, ⟦luong_local]}\n",
        "AZ302 who can: `additive`",
    ),
    "override_with_patch_drop": (
        f"{R}host: {{kind: vit, base: vit_tiny_patch16_224, model: {{patch_drop_rate: 0.5}}}}\n{A}"
        "overrides: [{at: blocks.3, put: ⟦fourier}]\n",
        "AZ302 `fourier` cannot be put at blocks.3",
    ),
    "many_mechanisms": (
        attention(f"⟦{{fuse: add, of: [{', '.join(['{fuse: mean, of: [softmax, soft, softmax, soft, soft]}'] * 13)}]}}"),
        "AZ312 `attention` merges 65 mechanisms; at most 64 can be",
    ),
    "many_mechanisms_in_depth": (
        put("{at: blocks.0, put: ⟦" + "{fuse: add, of: [softmax, softmax, softmax, softmax, softmax, " * 13 + "soft" + "]}" * 13 + "}"),
        "AZ312 `overrides.0.put` merges 66 mechanisms",
    ),
    "thousands_of_mechanisms": (attention("⟦" + nested(3, 16)), "AZ312 `attention` merges 4,096 mechanisms"),
    "name_of_a_text": (f"{H}{A}name: x\noverrides:\n  - {{at: ⟦b, put: softmax}}\n", "AZ304 `b` matches no site"),
}  # fmt: skip
YAML = {
    "duplicate": (f"{H}{A}⟦attention: soft\n", "AZ106 the first is on line 3"),
    "duplicate_nested": (model("⟦depth: 3"), "AZ106 `depth` stands here a second time"),
    "anchor": (attention("⟦&a softmax"), "AZ107 anchors (`&a`)"),
    "anchor_on_mapping": (attention("⟦&a {use: softmax}"), "AZ107 anchors (`&a`)"),
    "alias": (f"{H}attention: ⟦&a softmax\noverrides:\n  - {{at: blocks.0, put: ⟦*a}}\n", "AZ107 anchors", "AZ107 aliases (`*a`)"),
    "alias_as_key": (f"{H}{A}⟦*a : 3\n", "AZ107 aliases (`*a`)"),
    "merge": (f"{H}{A}⟦<<: {{name: x}}\n", "AZ107 use `extends: other.yaml`"),
    "tag_python": (attention("⟦!!python/object/apply:os.system ['true']"), "AZ107 tags (`!!python/object/apply:os.system`)"),
    "tag_own": (attention("⟦!foo softmax"), "AZ107 tags (`!foo`)"),
    "tag_standard": (model("embed_dim: ⟦!!int 192"), "AZ107 tags (`!!int`)"),
    "two_documents": (f"{H}{A}⟦---\nrecipe: 1\n", "AZ107 a second document begins here"),
    "tab": (f"{R}host:\n⟦\tkind: vit\n{A}", "AZ105 a tab stands where only spaces may"),
    "unclosed_bracket": (attention("{fuse: add, of: ⟦[softmax, soft"), "AZ105 a closing bracket is missing"),
    "unclosed_brace": (attention("⟦{use: softmax"), "AZ105 a closing bracket is missing"),
    "unclosed_quote": (f'{H}{A}summary: ⟦"open\n', "AZ105 a quote is not closed"),
    "colon_in_text": (f"{H}{A}summary: this⟦: that\n", "AZ105 a `:` where no key can stand"),
    "wrong_indent": (f"{R}host:\n    kind: vit\n  ⟦base: x\n{A}", "AZ105 does not line up"),
    "no_colon": (f"{H}{A}summary\n⟦", "AZ105 a key without `:`"),
    "percent": (f"{H}{A}summary: ⟦%x\n", "AZ105 no value can begin with this character"),
    "at_sign": (f"{H}{A}summary: ⟦@x\n", "AZ105 put the text in quotes"),
    "bad_escape": (f'{H}{A}summary: "a\\⟦q"\n', "AZ105 an escape that YAML does not know"),
    "empty": ("⟦\n", "AZ111 the recipe is empty"),
    "only_comments": ("⟦# nothing\n# at all\n", "AZ111 the recipe is empty"),
    "list_at_top": ("⟦- recipe: 1\n- 2\n", "AZ112 a recipe must be a mapping"),
    "text_at_top": ("⟦softmax\n...\n", "AZ112 begin with `recipe: 1`"),
    "complex_key": (f"{H}{A}? ⟦[a, b]\n: 3\n", "AZ109 a key must be a word"),
    "mapping_key": (f"{H}{A}? ⟦{{a: b}}\n: 3\n", "AZ109 a key must be a word"),
    "no_key": (f'{H}{A}⟦"": 3\n', "AZ109 there is no key in front"),
    "escape_in_name": (attention('⟦"\\e[2Jx"'), "AZ104 U+001B"),
    "escape_in_key": (f'{H}{A}⟦"\\e[2J": 3\n', "AZ104 U+001B"),
    "escape_of_nul": (f'{H}{A}summary: ⟦"a\\0b"\n', "AZ104 U+0000"),
    "control_character": (f"{H}{A}summary: a⟦\x07b\n", "AZ104 U+0007"),
    "nul": (f"{H}{A}summary: a⟦\x00b\n", "AZ104 U+0000"),
    "c1_control": (f"{H}{A}summary: a⟦\x9bb\n", "AZ104 U+009B"),
    "right_to_left_override": (f"{H}{A}summary: a⟦\u202eb\n", "AZ104 U+202E"),
    "line_separator": (f"{H}{A}summary: a⟦\u2028b\n", "AZ104 U+2028"),
    "zero_width_space": (attention("soft⟦\u200bmax"), "AZ104 U+200B (zero width space) does not show"),
    "zero_width_space_in_prose": (f"{H}{A}summary: a⟦\u200bb\n", "AZ104 U+200B"),
    "zero_width_space_escaped": (attention('⟦"soft\\u200bmax"'), "AZ104 U+200B"),
    "soft_hyphen": (attention("soft⟦\u00admax"), "AZ104 U+00AD (soft hyphen)"),
    "soft_hyphen_in_a_key": (f"{H}atten⟦\u00adtion: softmax\n", "AZ104 U+00AD"),
    "word_joiner": (attention("softmax⟦\u2060"), "AZ104 U+2060 (word joiner)"),
    "tag_character": (attention("softmax⟦\U000e0041"), "AZ104 U+E0041 (tag latin capital letter a)"),
    "language_tag": (f"{H}{A}summary: a⟦\U000e0001b\n", "AZ104 U+E0001 (language tag)"),
    "right_to_left_mark": (f"{H}{A}summary: a⟦\u200fb\n", "AZ104 U+200F (right-to-left mark)"),
    "arabic_letter_mark": (f"{H}{A}# ⟦\u061c\n", "AZ104 U+061C"),
    "isolate": (f"{H}{A}source: a⟦\u2067b\n", "AZ104 U+2067"),
    "hangul_filler": (f"{H}{A}name: ⟦\u3164\n", "AZ104 U+3164 (hangul filler)"),
    "no_break_space_in_a_name": (attention("soft⟦\u00a0max"), "AZ104 U+00A0 (no-break space) looks like a space and is none"),
    "no_break_space_after_a_colon": (f"recipe:⟦\u00a01\n{H[10:]}{A}", "AZ104 U+00A0"),
    "no_break_space_in_an_option": (attention("{use: soft, with: {variant: gated⟦\u00a0}}"), "AZ104 U+00A0"),
    "ideographic_space": (f"{H}attention:⟦\u3000softmax\n", "AZ104 U+3000 (ideographic space)"),
    "thin_space_in_a_number": (model("embed_dim: 19⟦\u20092"), "AZ104 U+2009 (thin space)"),
    "joiner_in_a_name": (attention("soft⟦\u200dmax"), "AZ104 U+200D (zero width joiner)"),
    "joiner_in_a_key": (f"{H}{A}sum⟦\u200dmary: x\n", "AZ104 U+200D"),
    "variation_selector_in_a_name": (attention("softmax⟦\ufe0f"), "AZ104 U+FE0F (variation selector-16)"),
    "ideographic_variation_in_a_name": (attention("softmax⟦\U000e0101"), "AZ104 U+E0101"),
    "selector_in_data": (f"{H}{A}train: {{data: cifar10⟦\ufe0e}}\n", "AZ104 U+FE0E"),
    "bom_inside": (f"{H}{A}summary: a⟦\ufeffb\n", "AZ104 U+FEFF"),
    "surrogate": (f"{H}{A}summary: a⟦\ud800b\n", "AZ104 U+D800"),
    "33_levels": (f"{H}attention: {'[' * 30}[⟦[x]]{']' * 30}\n", "AZ108 more than 32 levels deep"),
    "60000_brackets": (f"\n{'[' * 32}⟦[{'[' * 60_000}", "AZ108 more than 32 levels deep"),
    "100000_brackets": (f"⟦\n{'[' * 100_000}", "AZ102 a recipe has at most 65,536"),
    "60000_braces": (f"\n{'{a: ' * 32}⟦{{a: {'{a: ' * 10_000}", "AZ108 more than 32 levels deep"),
    "10001_values": (f"{H}{A}x: [{'1,' * 9_991}⟦1,1]\n", "AZ108 more than 10,000 values"),
    "crlf": (f"{H}{A}".replace("\n", "\r\n") + "⟦colour: red\r\n", "AZ110 unknown key `colour`"),
    "old_mac": (f"{H}{A}".replace("\n", "\r") + "⟦colour: red\r\n", "AZ110 unknown key `colour`"),
}  # fmt: skip
SEVERAL = {
    "eight": (
        "recipe: ⟦2\nname: ⟦5\nhost:\n  kind: ⟦vitt\n  model: {img_size: ⟦x, embed_dim: ⟦0, ⟦dephth: 3}\n  ⟦depth: 3\n"
        "attention: ⟦hadamard\n",
        "AZ113 version 1", "AZ112 in quotes", "AZ113 `vit`?", "AZ112 or a list of 2", "AZ113 8192", "AZ110 `depth`?",
        "AZ110 stands under", "AZ203 a fusion",
    ),
    "schema_and_names": (
        f"{H}attention: {{fuse: ⟦hadamrd, level: ⟦head, of: [⟦softmx, {{use: soft, with: {{variant: ⟦pold, ⟦varant: 3}}, ⟦hads: 3}}]}}\n",
        "AZ201 `hadamard`?", "AZ113 `heads`?", "AZ201 `softmax`?", "AZ212 `pooled`?", "AZ210 `variant`?", "AZ110 `heads`?",
    ),
    "schema_and_base": (
        f"{R}host: {{kind: ⟦vitt, base: ⟦vit_tinny_patch16_224}}\nattention: ⟦sofmax\n",
        "AZ113 `vit`?", "AZ301 did you mean", "AZ201 `softmax`?",
    ),
    "text_and_schema_and_names": (
        f"{H}⟦colour: red\nattention: {{use: ⟦softmx}}\nsummary: ⟦&a hello\nname: ⟦BAD\n⟦summary: again\n",
        "AZ110 `colour`", "AZ201 `softmax`?", "AZ107 anchors", "AZ113 a-z", "AZ106 second time",
    ),
    "text_and_composing": (
        f"{H}attention: {{use: ⟦softmax, heads: 5}}\nsummary: a\n⟦summary: b\n",
        "AZ308 5 heads", "AZ106 line 4",
    ),
    "three_overrides": (
        f"{H}{A}overrides:\n  - {{at: ⟦blocks.9, put: ⟦sof}}\n  - {{at: blocks.0, put: {{use: soft, with: {{⟦hiden: 3}}}}}}\n"
        "  - {at: blocks.1, put: ⟦add}\n",
        "AZ304 no site", "AZ201 `soft`?", "AZ210 `hidden`?", "AZ203 fusion",
    ),
    "missing_and_wrong": (
        "⟦recipe: 1\n⟦host: {base: ⟦5}\noverrides: ⟦3\n",
        "AZ111 `attention`", "AZ111 `kind`", "AZ112 host.base", "AZ112 a list",
    ),
    "two_unmet_demands": (
        f"{R}host: {{kind: vit, base: vit_tiny_patch16_224, model: {{patch_drop_rate: 0.5}}}}\n"
        "attention: {fuse: mean, of: [⟦neighborhood, {use: ⟦neighborhood, with: {window: 3}}]}\n",
        "AZ302 neighborhood", "AZ302 neighborhood",
    ),
}  # fmt: skip
GROUPS = {
    "keys": KEYS, "missing": MISSING, "types": TYPES, "ranges": RANGES, "names": NAMES, "composing": COMPOSING,
    "yaml": YAML, "several": SEVERAL,
}  # fmt: skip
TEXTS = [
    pytest.param(text, expected, id=f"{group}-{name}")
    for group, cases in GROUPS.items()
    for name, (text, *expected) in cases.items()
]
JARGON = re.compile(
    r"\b(str|dict|int|bool|float|NoneType|Input should|pydantic|valid (string|integer|number))\b|type="
)


@pytest.fixture(scope="module", autouse=True)
def warm():
    """torch, timm and the zoo are loaded before anything is timed."""
    compose_file("ham_a")


def marked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A text without its marks, and the lines and columns of these."""
    spots, clean = [], ""
    for part in re.split("(⟦)", text):
        if part == "⟦":
            lines = re.split("\r\n|\r|\n", clean)
            spots.append((len(lines), len(lines[-1]) + 1))
        else:
            clean += part
    return clean, spots


def faults_of(recipe, edits=(), run=compose_file):
    """What is raised, in at most a second and in plain words."""
    began = time.process_time()
    with pytest.raises(ZooError) as caught:
        run(recipe, edits=edits)
    assert time.process_time() - began < 2
    for fault in caught.value.diagnostics:
        said = re.sub("`[^`]*`", "", f"{fault.message} {fault.why} {fault.help}")
        assert not JARGON.search(said), fault
        assert len(fault.message) < 400
    assert all(c.isprintable() or c == "\n" for c in str(caught.value))
    return caught.value.diagnostics


def agree(faults, spots, expected):
    """Hold faults to what is expected of them, one by one."""
    shown = [(f.code, (f.place.line, f.place.column) if f.place else None, f.message, f.help) for f in faults]
    assert [(f.code, (f.place.line, f.place.column)) for f in faults] == [
        (want.split()[0], spot) for want, spot in zip(expected, spots, strict=True)
    ], shown
    for fault, want in zip(faults, expected, strict=True):
        assert want.partition(" ")[2] in f"{fault.message} | {fault.why} | {fault.help}"


def test_there_are_many_cases():
    assert len(TEXTS) + len(FILES) + len(EDITS) + len(FAMILY) >= 150


@pytest.mark.parametrize(("text", "expected"), TEXTS)
def test_bad_text(text, expected):
    clean, spots = marked(text)
    agree(faults_of(clean), spots, expected)


@pytest.mark.parametrize("part", range(5))
@pytest.mark.sample(5)
def test_the_command_line_ends_with_2_and_without_a_traceback(part, tmp_path):
    runner, file = CliRunner(), tmp_path / "bad.yaml"
    for case in TEXTS[part::5]:
        text, expected = case.values
        clean, spots = marked(text)
        if any("\ud800" <= c <= "\udfff" for c in clean):  # no file can hold these as UTF-8
            continue
        file.write_bytes(clean.encode())
        result = runner.invoke(app, ["compose", str(file)])
        assert result.exit_code == 2 and "Traceback" not in result.output, (case.id, result.output)
        for want, (line, column) in zip(expected, spots, strict=True):
            assert f"error[{want.split()[0]}]" in result.output, case.id
            assert f"bad.yaml:{line}:{column}" in result.output, case.id


@pytest.mark.parametrize(("text", "expected"), TEXTS)
@pytest.mark.sample(4)
def test_load_alone_finds_what_is_in_the_text(text, expected):
    clean, _ = marked(text)
    if all(want[:5] in ("AZ110", "AZ111", "AZ112", "AZ113", "AZ114") or want < "AZ110" for want in expected):
        assert [f.code for f in faults_of(clean, run=load)] == [want.split()[0] for want in expected]


def test_lock_does_not_hold():
    clean, spots = marked(f"{H}{A}expect:\n  params: ⟦7\n")
    agree(faults_of(clean, run=compose), spots, ["AZ307 the recipe expects 7"])


FILES = {
    "utf16": (f"{H}{A}".encode("utf-16"), (1, 1), "AZ103 this looks like UTF-16"),
    "utf16_without_mark": (f"{H}{A}".encode("utf-16-le"), (1, 2), "AZ104 U+0000"),
    "latin1": (f"{H}{A}summary: é\n".encode("latin-1"), (4, 10), "AZ103 save the file as UTF-8"),
    "latin1_after_utf8": (f"{H}{A}summary: é".encode() + b"\xe9\n", (4, 11), "AZ103 (0xe9)"),
    "cut_off": (f"{H}{A}summary: é".encode()[:-1], (4, 10), "AZ103 is not UTF-8"),
    "nul_bytes": (bytes(1000), (1, 1), "AZ104 U+0000"),
    "ten_megabytes": (b"# " + b"x" * 10_000_000, (1, 1), "AZ102 has 10,000,002 bytes"),
    "empty_file": (b"", (1, 1), "AZ111 the recipe is empty"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(100), (1, 1), "AZ103 (0x89)"),
    "other_name": (f"{H}{A}name: other\n".encode(), (4, 7), "AZ115 its file `r`"),
}


@pytest.mark.parametrize(("data", "spot", "expected"), FILES.values(), ids=FILES)
def test_bad_file(tmp_path, data, spot, expected):
    file = tmp_path / "r.yaml"
    file.write_bytes(data)
    agree(faults_of(str(file)), [spot], [expected])


def test_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    cases = {
        "missing.yaml": "no such file", "fifo.yaml": "not a regular file", "folder.yaml": "it is a folder",
        "a\0b.yaml": "cannot be the name of a file", f"{'x' * 5000}.yaml": "too long", "loop.yaml": "cannot read",
    }  # fmt: skip
    for name, words in cases.items():
        (fault,) = faults_of(f"{tmp_path}/{name}")
        assert fault.code == "AZ101" and words in fault.message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(H + A)
    file.chmod(0)
    assert faults_of(str(file))[0].code == "AZ101"


@pytest.mark.parametrize(
    "name", ["ham_aa", "", "nope", "x" * 10_000, "\x1b[2J", "a/b", "\0", b"ham_", "\ud800"]
)
def test_no_such_recipe(name):
    (fault,) = faults_of(name)
    assert fault.code in ("AZ204", "AZ101")


def test_bom_is_accepted(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + f"{H}{A}name: r\n".encode())
    assert load(file).name == load(f"\ufeff{H}{A}name: r\n").name == "r"


EDITS = {
    "no_equals": (["attention"], 1, "AZ117 write it as"),
    "no_path": (["=3"], 1, "AZ117 is no edit"),
    "hole": (["host..depth=3"], 1, "AZ117 is no edit"),
    "extends": (["extends=ham_b"], 1, "AZ117 cannot be set"),
    "inside_text": (["name.x=3"], 6, "AZ117 `name` is no mapping and no list"),
    "inside_number": (["recipe.x=3"], 8, "AZ117 `recipe` is no mapping and no list"),
    "no_such_entry": (["attention.of.7=soft"], 14, "AZ117 `attention.of` has entries 0 to 1"),
    "word_for_entry": (["attention.of.x=soft"], 14, "AZ117 there is no `x`"),
    "empty_list": (["overrides=[]", "overrides.0.at=x"], 11, "AZ117 is an empty list"),
    "misspelt_key": (["attenton.of=3"], 1, "AZ110 did you mean `attention`?"),
    "misspelt_last": (["host.model.dept=3"], 12, "AZ110 did you mean `depth`?"),
    "misspelt_value": (["attention.with.start=idntity"], 22, "AZ212 did you mean `identity`?"),
    "misspelt_name": (["attention.of.1=sofft"], 16, "AZ201 did you mean `soft`?"),
    "misspelt_option": (["attention.of.1.with.varant=gated"], 21, "AZ210 did you mean `variant`?"),
    "wrong_type": (["host.model.depth=two"], 18, "AZ112 from 1 to 96"),
    "out_of_range": (["host.model.depth=0"], 18, "AZ113 this is 0"),
    "broken_value": (["host.model.depth=[1"], 18, "AZ105 a closing bracket is missing"),
    "true_for_version": (["recipe=true"], 8, "AZ112 must be `1`; this is true"),
    "hidden_in_value": (["attention=soft\u200bmax"], 15, "AZ104 U+200B (zero width space)"),
    "hidden_in_path": (["attention\u00a0=softmax"], 10, "AZ104 U+00A0 (no-break space)"),
    "joiner_in_name": (["name=ham_a\u200d_base"], 11, "AZ104 U+200D"),
    "small_image": (["host.model.img_size=8"], 21, "AZ320 holds no patch"),
    "old_and_new_name": (
        ["attention.of.1.with.reading=gated", "attention.of.1.with.variant=gated"],
        21,
        "AZ217 leave `reading` out",
    ),
    "tag": (["attention=!foo softmax"], 11, "AZ107 tags (`!foo`)"),
    "control": (["summary=\x1b[2J"], 9, "AZ104 U+001B"),
}


@pytest.mark.parametrize(("edits", "column", "expected"), EDITS.values(), ids=EDITS)
def test_bad_edit(edits, column, expected):
    agree(faults_of("ham_a_base", edits), [(1, column)], [expected])


def test_bad_edits_are_reported_together():
    faults = faults_of(
        "ham_a_base", ["host.model.depth=x", "attention.of.0=sftmax", "name.x=1", "colour=red"]
    )
    assert sorted(f.code for f in faults) == ["AZ110", "AZ112", "AZ117", "AZ201"]


FAMILY = {
    "missing": ({}, "extends: ⟦other.yaml", "AZ116 it must stand in the same folder"),
    "misspelt": ({"parent.yaml": H + A}, "extends: ⟦parnt.yaml", "AZ116 did you mean `parent.yaml`?"),
    "unknown_name": ({}, "extends: ⟦ham_aa", "AZ204 did you mean `ham_a`?"),
    "parent_folder": ({}, "extends: ⟦../r.yaml", "AZ116 never reads outside its folder"),
    "absolute": ({}, "extends: ⟦/etc/passwd", "AZ116 not `/etc/passwd`"),
    "backslash": ({}, "extends: ⟦a\\b.yaml", "AZ116 a file of the same folder"),
    "hidden": ({}, "extends: ⟦.x.yaml", "AZ116 a file of the same folder"),
    "nothing": ({}, "extends: ⟦''", "AZ116 a file of the same folder"),
    "self": ({}, "extends: ⟦r.yaml", "AZ116 in a circle: `r.yaml` -> `r.yaml`"),
    "folder": ({"d.yaml/x": ""}, "extends: ⟦d.yaml", "AZ116 is no file here"),
    "list": ({"l.yaml": "[1]"}, "extends: ⟦l.yaml", "AZ116 holds no recipe"),
}


@pytest.mark.parametrize(("files", "text", "expected"), FAMILY.values(), ids=FAMILY)
def test_bad_extends(tmp_path, files, text, expected):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    clean, spots = marked(f"recipe: 1\n{text}\n")
    (tmp_path / "r.yaml").write_text(clean)
    agree(faults_of(tmp_path / "r.yaml"), spots, [expected])


def test_extends_out_of_the_folder_by_a_link(tmp_path):
    (tmp_path / "secret.yaml").write_text(H + A)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.yaml").symlink_to("../secret.yaml")
    (tmp_path / "in" / "r.yaml").write_text("recipe: 1\nextends: link.yaml\n")
    agree(faults_of(tmp_path / "in" / "r.yaml"), [(2, 10)], ["AZ116 a link out of its folder"])


def test_extends_in_a_circle_and_too_far(tmp_path):
    for i in range(12):
        (tmp_path / f"c{i}.yaml").write_text(f"recipe: 1\nextends: c{i + 1}.yaml\n")
    (fault,) = faults_of(tmp_path / "c0.yaml")
    assert fault.code == "AZ116" and "more than 8" in fault.message
    (tmp_path / "c2.yaml").write_text("recipe: 1\nextends: c0.yaml\n")
    (fault,) = faults_of(tmp_path / "c0.yaml")
    assert "`c0.yaml` -> `c1.yaml` -> `c2.yaml` -> `c0.yaml`" in fault.message


def test_faults_of_the_extended_file_are_placed_there(tmp_path):
    (tmp_path / "p.yaml").write_text(f"{H}colour: red\nattention: sofmax\n")
    (tmp_path / "r.yaml").write_text("recipe: 1\nextends: p.yaml\nexpect: {params: x}\n")
    faults = faults_of(tmp_path / "r.yaml")
    found = {(os.path.basename(f.place.file), f.code, f.place.line, f.place.column) for f in faults}
    assert found == {("r.yaml", "AZ112", 3, 18), ("p.yaml", "AZ110", 3, 1), ("p.yaml", "AZ201", 4, 12)}


def test_a_text_cannot_extend_a_file():
    agree(faults_of("recipe: 1\nextends: x.yaml\n"), [(2, 10)], ["AZ116 has no folder"])


def test_at_most_twenty_faults():
    text = H + "attention:\n  fuse: add\n  of: [" + ", ".join(f"nosuch{i}" for i in range(16)) + "]\n"
    keys = "".join(f"key{i}: 1\n" for i in range(3000))
    assert len(faults_of(text + keys)) == 20


def test_the_worst_cases_need_little_memory():
    """In a process of its own: 10 MB of text, 60,000 brackets, thousands of faults."""
    code = """
import resource
from attnzoo.recipe import compose_file, load
from attnzoo.errors import ZooError
compose_file("ham_a")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
flat = "recipe: 1\\n"
worst = [
    flat + "[" * 60_000, flat + "{a: " * 16_000, flat + "x: " + "9" * 60_000, flat + "- " * 30_000,
    flat + "".join(f"k{i}: {{a: 1}}\\n" for i in range(4_000)), flat + "&a " * 20_000,
    flat + "attention: {fuse: add, of: [" + "x, " * 9_000 + "]}", flat + "\\"" + "\\\\x41" * 15_000,
    flat + "overrides: [" + "{at: b, put: {fuse: q, of: [z]}}," * 1_500 + "]", "# " + "x" * 10_000_000 + "\\n",
    flat + "? " * 30_000, flat + "a" * 65_000 + ": 1", flat + "a: 'x\\n" + "\\n" * 60_000,
]
for text in worst:
    try:
        load(text)
    except ZooError:
        pass
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
assert grown < 512, grown
print(round(grown))
"""
    done = processes.run("-c", code)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------------- train


def train(text: str, kind: str = "vit, base: vit_tiny_patch16_224, model: {depth: 1}") -> str:
    """A recipe that is trained so."""
    return f"{R}host: {{kind: {kind}}}\n{A}train: {{{text}}}\n"


TRAIN = {
    "data_misspelt": (train("data: ⟦cifar11"), "AZ701 did you mean `cifar10`?"),
    "folder_without_a_path": (train("data: '⟦folder:'".replace("'⟦", "⟦'")), "AZ701 there is no data set `folder:`"),
    "pairs_for_images": (train("data: ⟦reverse"), "AZ814 these are pairs of sequences"),
    "sequences_for_images": (train("data: ⟦'recall:pairs=2'"), "AZ814 these are single sequences"),
    "sequences_misspelt": (train("data: ⟦recal", "sequence"), "AZ701 did you mean `recall`?"),
    "sequence_option": (train("data: ⟦'recall:par=2'", "sequence"), "AZ715 did you mean `pairs`?"),
    "sequence_options_that_do_not_go_together": (train("data: ⟦'recall:length=31'", "sequence"), "AZ715 the length 31 is odd"),
    "markov_option": (train("data: ⟦'markov:order=99'", "sequence"), "AZ715 `order` of `markov`"),
    "regression_option": (train("data: ⟦'regression:dim=0'", "sequence"), "AZ715 `dim` of `regression`"),
    "switching_option": (train("data: ⟦'switching:x=0'", "sequence"), "AZ715 `switching` has no option `x`"),
    "fitting_option": (train("data: ⟦'fitting:positions=no'", "sequence"), "AZ715 `true` or `false`"),
    "strings_option": (train("data: ⟦'sort:symbol=3'", "seq2seq"), "AZ715 did you mean `symbols`?"),
    "too_many_strings": (train("data: ⟦'copy:length=2,symbols=2'", "seq2seq"), "AZ715 are too many"),
    "opus_pair": (train("data: ⟦'opus_books:en-xx'", "seq2seq"), "AZ712 OPUS Books has no pair `en-xx`"),
    "opus_form": (train("data: ⟦'opus:Tatoeba:en-es'", "seq2seq"), "AZ712 is not of the form"),
    "one_aligned_file": (train("data: ⟦'aligned:x'", "seq2seq"), "AZ712 names 1 file, not 2"),
    "moses_pair": (train("data: ⟦'moses:x.zip:en_es'", "seq2seq"), "AZ712 did you mean `en-es`?"),
    "tsv_without_a_file": (train("data: ⟦'tsv:'", "seq2seq"), "AZ712 names no file"),
    "gettext_without_a_file": (train("data: ⟦'gettext:'", "seq2seq"), "AZ712 names no file"),
    "pairs_misspelt": (train("data: ⟦revers", "seq2seq"), "AZ701 did you mean `reverse`?"),
    "step_misspelt": (train("augment: [horizontal_flip, ⟦random_crp]"), "AZ705 did you mean `random_crop`?"),
    "long_step": (train(f"augment: [⟦{'x' * 100}]"), "AZ705 the steps are random_crop"),
    "step_option": (train("augment: [{use: random_crop, with: {⟦paddin: 3}}]"), "AZ706 did you mean `padding`?"),
    "step_option_of_the_wrong_type": (train("augment: [{use: random_crop, with: {⟦padding: many}}]"), "AZ706 `padding` of `random_crop`"),
    "step_order": (train("augment: [mixup, ⟦random_crop]"), "AZ707 put `random_crop` earlier"),
    "optimiser_misspelt": (train("optimizer: {use: ⟦adamww}"), "AZ806 did you mean `adamw`?"),
    "schedule_misspelt": (train("schedule: {use: ⟦cosin}"), "AZ113 did you mean `cosine`?"),
    "key_misspelt": (train("⟦epoch: 3"), "AZ110 did you mean `epochs`?"),
    "with_other_faults": (
        f"{H}attention: ⟦sofmax\ntrain: {{data: ⟦cifar11, augment: [⟦x, mixup, {{use: ⟦resize, with: {{⟦a: 1, ⟦b: 2}}}}], optimizer: {{use: ⟦x}}}}\n",
        "AZ201 softmax", "AZ701 cifar10", "AZ705 no augmentation step", "AZ707 earlier", "AZ706 `a`", "AZ706 `b`", "AZ806 called `x`",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"), [(text, expected) for text, *expected in TRAIN.values()], ids=TRAIN
)
def test_bad_training(text, expected, tmp_path):
    clean, spots = marked(text)
    agree(faults_of(clean, run=lambda recipe, edits: checked(load(recipe, edits))), spots, expected)
    (tmp_path / "bad.yaml").write_text(clean)
    for verb in ("compose", "train"):
        result = CliRunner().invoke(app, [verb, str(tmp_path / "bad.yaml")])
        assert result.exit_code == 2 and f"error[{expected[0][:5]}]" in result.output, result.output
        assert verb == "train" or f"bad.yaml:{spots[0][0]}:{spots[0][1]}" in result.output


@pytest.mark.parametrize("text", [train(""), train("", "sequence"), train("", "seq2seq"), train("data: folder:/no/such/folder"),
                                  train("data: tsv:no_such_file.tsv, optimizer: {use: lion}", "seq2seq")])  # fmt: skip
def test_what_is_not_said_or_not_here_is_no_fault(text):
    checked(load(text))


def test_all_recipes_can_be_trained_as_they_say():
    for name in load_zoo().recipes:
        assert train_faults(load(name)) == [], name


# ------------------------------------------------------------------------------------------------------- too large

HUGE = {
    "sequence": (f"{R}host: ⟦{{kind: sequence, dim: 65536, layers: 256}}\n{A}"),
    "seq2seq": (f"{R}host: ⟦{{kind: seq2seq, dim: 65536, layers: 256}}\n{A}"),
    "seq2seq_tied": (f"{R}host: ⟦{{kind: seq2seq, dim: 65536, layers: 256, tie: all}}\n{A}"),
    "vocab": (f"{R}host: ⟦{{kind: seq2seq, dim: 65536, vocab: 10000000}}\n{A}"),
    "outputs": (f"{R}host: ⟦{{kind: sequence, dim: 65536, outputs: 10000000}}\n{A}"),
    "length": (f"{R}host: ⟦{{kind: sequence, dim: 65536, layers: 256, max_length: 1000000, positions: sinusoidal, mlp_dim: 0}}\n{A}"),
    "positions": (f"{R}host: ⟦{{kind: sequence, dim: 65536, max_length: 1000000, positions: learned}}\n{A}"),
    "mlp": (f"{R}host: ⟦{{kind: sequence, dim: 65536, layers: 256, mlp_dim: 1000000}}\n{A}"),
    "vit": (f"{R}host: {{kind: vit, model: ⟦{{embed_dim: 8192, depth: 96, num_heads: 1, mlp_ratio: 64}}}}\n{A}"),
    "vit_patches": (f"{R}host: {{kind: vit, model: ⟦{{img_size: 4096, patch_size: 1, embed_dim: 8192, num_heads: 1, depth: 96}}}}\n{A}"),
    "vit_patch": (f"{R}host: {{kind: vit, model: ⟦{{img_size: 1024, patch_size: 1024, in_chans: 1024, embed_dim: 8192, num_heads: 1}}}}\n{A}"),
    "cct": (f"{R}host: {{kind: cct, model: ⟦{{embed_dim: 8192, num_heads: 1, depth: 96, kernel_size: 31, n_conv_layers: 8, mlp_ratio: 64}}}}\n{A}"),
    "branches": (
        f"{R}host: {{kind: vit, model: ⟦{{embed_dim: 8192, depth: 96, num_heads: 1, mlp_ratio: 0.1}}}}\n"
        f"attention: {nested(2, 8).replace('fuse: add', 'fuse: add, level: tokens')}\n"
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
def test_what_cannot_be_built_here_is_refused_at_once(text, monkeypatch):
    monkeypatch.delenv("ATTNZOO_FORCE", raising=False)
    clean, spots = marked(text)
    agree(faults_of(clean), spots, ["AZ311 ATTNZOO_FORCE=1 tries all the same"])
    assert not _global_parameter_registration_hooks


def test_branches_count(monkeypatch):
    """What fits with one mechanism at a site may not fit with many; a mechanism without weights counts as none."""
    monkeypatch.delenv("ATTNZOO_FORCE", raising=False)
    text = f"{R}host: {{kind: vit, base: vit_tiny_patch16_224}}\nattention: %s\n"
    one = "{fuse: add, level: tokens, of: [softmax]}"
    many = f"{{fuse: add, level: tokens, of: [{', '.join(['softmax'] * 16)}]}}"
    params = {
        name: sum(p.numel() for p in compose(text % name).parameters()) for name in (one, many, "fourier")
    }
    need = {name: training_bytes(count, 16 * 12 * 197 * 192) for name, count in params.items()}
    monkeypatch.setattr("attnzoo.hosts.info.available_memory", lambda: int(need[one] / 0.8) + 1000)
    compose_file(text % one)
    compose_file(text % "fourier")
    assert faults_of(text % many)[0].why == f"{params[many]:,} parameters, 197 tokens"
    monkeypatch.setattr("attnzoo.hosts.info.available_memory", lambda: int(need["fourier"] / 0.8) + 1000)
    compose_file(text % "fourier")
    assert faults_of(text % one)[0].code == "AZ311"


def test_force_tries_what_is_only_too_large(monkeypatch):
    monkeypatch.setenv("ATTNZOO_FORCE", "1")
    info = compose_file(f"{R}host: {{kind: sequence, dim: 65536, layers: 2}}\n{A}").info
    assert info.params > 2 * 4 * 65536**2
    assert faults_of(model("img_size: 8"))[0].code == "AZ320"
    assert faults_of(attention(nested(2, 9)))[0].code == "AZ312"


def test_only_what_this_thread_builds_is_counted(monkeypatch):
    monkeypatch.delenv("ATTNZOO_FORCE", raising=False)
    monkeypatch.setattr("attnzoo.hosts.info.available_memory", lambda: 10_000)
    built = []
    with unallocated():
        thread = threading.Thread(target=lambda: built.append(torch.nn.Linear(100, 100)))
        thread.start()
        thread.join()
        with pytest.raises(RecipeError, match="AZ311"):
            torch.nn.Linear(100, 100)
    assert not built[0].weight.is_meta


def test_unallocated_models_are_as_allocated_ones():
    with unallocated():
        quick = timm.create_model("vit_tiny_patch16_224", depth=2)
    plain = timm.create_model("vit_tiny_patch16_224", depth=2)
    shapes = [{name: (p.shape, p.dtype) for name, p in model.named_parameters()} for model in (quick, plain)]
    assert shapes[0] == shapes[1] and all(p.is_meta for p in quick.parameters())


# ------------------------------------------------------------------------------------------------------- arguments

ARGUMENTS = {
    "small_image": ({"img_size": 8}, "img_size", "AZ320 holds no patch of 16 × 16"),
    "small_side": ({"img_size": (8, 224)}, "img_size", "AZ320 8 × 224"),
    "image_text": ({"img_size": "big"}, "img_size", "AZ112 this is the text `big`"),
    "depth_bomb": ({"depth": 10**6}, "depth", "AZ113 from 1 to 96; this is 1000000"),
    "depth_true": ({"depth": True}, "depth", "AZ112 this is true"),
    "depth_array": ({"depth": np.int64(3)}, "depth", "AZ112 `numpy.int64`"),
    "width_bomb": ({"embed_dim": 10**9}, "embed_dim", "AZ113 from 1 to 8192"),
    "width": ({"embed_dim": 100}, "embed_dim", "AZ308 3 heads do not divide"),
    "classes": ({"num_classes": -1}, "num_classes", "AZ113 from 0"),
    "pool": ({"global_pool": "tokn"}, "global_pool", "AZ113 did you mean `token`?"),
    "hidden": ({"global_pool": "tok\u200ben"}, "global_pool", "AZ104 U+200B"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "name", "expected"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_bad_arguments(given, name, expected):
    text = f"{R}host: {{kind: vit, base: vit_tiny_patch16_224}}\n{A}"
    for run in (lambda recipe, edits: compose(recipe, **given),
                lambda recipe, edits: timm.create_model("attnzoo_vit", recipe=recipe, **given)):  # fmt: skip
        (fault,) = faults_of(text, run=run)
        assert str(fault.place) == f"<arguments>: {name}" and fault.code == expected[:5]
        assert expected[6:] in f"{fault.message} | {fault.why} | {fault.help}"


def test_good_arguments():
    text = f"{R}host: {{kind: vit, base: vit_tiny_patch16_224, mean: [0, 0, 0], model: {{depth: 1}}}}\n{A}"
    given = {
        "img_size": torch.Size([32, 48]),
        "norm_layer": torch.nn.LayerNorm,
        "in_chans": 1,
        "num_classes": 3,
    }
    assert compose(text, **given)(torch.zeros(2, 1, 32, 48)).shape == (2, 3)
    with pytest.raises(RecipeError, match="AZ302"):
        compose(text.replace("softmax", "fourier"), patch_drop_rate=0.5)


# ------------------------------------------------------------------------------------------------------------- typos


def slip(word: str, rng: random.Random) -> str:
    """A word with one letter left out, put in, changed, or swapped with its neighbour."""
    kind, i = rng.randrange(4), rng.randrange(len(word))
    letter = rng.choice(string.ascii_lowercase + "_")
    if kind == 0 and len(word) > 1:
        return word[:i] + word[i + 1 :]
    if kind == 1:
        return word[:i] + letter + word[i:]
    if kind == 2 or len(word) < 2:
        return word[:i] + letter + word[i + 1 :]
    i = min(i, len(word) - 2)
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]


def words() -> list[tuple[str, str, set[str]]]:
    """Every word of the language: itself, a recipe in which `%s` stands for it, and what is right there too."""
    zoo = load_zoo()
    names = "recipe: 1\nhost: {base: 5}\nattention: "  # this fault makes `load` look at the names, and not at the base
    places = {
        Recipe: f"{names}softmax\n%s: 3\n", VitHost: "host: {base: 5, %s: 3}\n", VitModel: "host: {model: {%s: 3}, base: 5}\n",
        CctHost: "host: {kind: cct, base: 5, %s: 3}\n", CctModel: "host: {kind: cct, model: {%s: 3}, base: 5}\n",
        PyramidHost: "host: {kind: pyramid, base: 5, %s: 3}\n", PyramidModel: "host: {kind: pyramid, model: {%s: 3}, base: 5}\n",
        DualHost: "host: {kind: dual, base: 5, %s: 3}\n", DualModel: "host: {kind: dual, model: {%s: 3}, base: 5}\n",
        Use: f"{names}{{use: softmax, %s: 3}}\n", Fuse: f"{names}{{fuse: add, of: [softmax], %s: 3}}\n",
        Override: f"{names}softmax\noverrides: [{{at: blocks.0, put: softmax, %s: 3}}]\n",
        Expect: f"{names}softmax\nexpect: {{%s: 3}}\n",
    }  # fmt: skip
    found = [(key, text, set(_fields(owner))) for owner, text in places.items() for key in _fields(owner)]
    found += [
        ("use", f"{names}{{%s: softmax}}\n", {"use", "fuse"}),
        ("of", f"{names}{{fuse: add, %s: [softmax]}}\n", set(_fields(Fuse))),
    ]
    found += [("fuse", f"{names}{{%s: add, of: [softmax]}}\n", {*_fields(Fuse), "use"})]
    for registry, name_text, option_text in (
        (zoo.mechanisms, f"{names}%s\n", "{{use: {}, with: {{%s: 3}}}}"),
        (zoo.fusions, f"{names}{{fuse: %s, of: [softmax, soft]}}\n", "{{fuse: {}, of: [softmax, soft], with: {{%s: 3}}}}"),
    ):  # fmt: skip
        both = {*zoo.mechanisms, *zoo.fusions}
        for name, entry in registry.items():
            if entry.plugin != "attnzoo":
                continue
            found.append((name, name_text, both))
            options = set(options_of(entry.value).model_fields)
            found += [(option, f"{names}{option_text.format(name)}\n", options) for option in sorted(options)]
    return found


def test_typos_get_the_right_hint():
    rng = random.Random(20)
    language = words()
    right = asked = 0
    missed = []
    while asked < 2400:
        word, text, valid = language[asked % len(language)]
        typo = slip(word, rng)
        if typo in valid:
            rng.shuffle(language)
            continue
        asked += 1
        try:
            load(text.replace("%s", typo))
            faults = ()
        except RecipeError as error:
            faults = error.diagnostics
        if any(f"`{word}`?" in fault.help for fault in faults):
            right += 1
        else:
            missed.append((word, typo, [f.help for f in faults]))
    assert right / asked >= 0.97, (right, asked, missed[:40])


# -------------------------------------------------------------------------------------------------------------- fuzz

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**25), 10**25), st.floats(), st.text(max_size=20),
    st.sampled_from(["softmax", "soft", "add", "hadamard", "vit", "blocks.*", "yes", "1e-3", "../x", "heads", "%", "&a", "*a"]),
)  # fmt: skip
WORDS = st.sampled_from(
    [
        key
        for owner in (
            Recipe,
            VitHost,
            VitModel,
            CctHost,
            CctModel,
            DualHost,
            DualModel,
            PyramidHost,
            PyramidModel,
            Use,
            Fuse,
            Override,
            Expect,
        )
        for key in _fields(owner)
    ]
    + ["", "<<", "x"]
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)
GOOD = [load(name).source.tree for name in ("ham_a", "local_then_global", "nested", "cct_conv_front")]


def paths(tree, loc=()):
    """Where all values of a tree are."""
    yield loc
    for key, value in (
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    ):
        yield from paths(value, (*loc, key))


@st.composite
def mutated(draw):
    """A good recipe in which a few values are replaced, removed or joined by others."""
    tree = copy.deepcopy(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(1, 4))):
        loc = draw(st.sampled_from([p for p in paths(tree) if p] or [()]))
        if not loc:
            break
        inner = tree
        for step in loc[:-1]:
            inner = inner[step]
        action = draw(st.sampled_from(["replace", "remove", "join"]))
        if action == "remove":
            del inner[loc[-1]]
        elif action == "join" and isinstance(inner, dict):
            inner[draw(WORDS)] = draw(TREES)
        else:
            inner[loc[-1]] = draw(TREES)
    return tree


def written(value) -> str:
    """A tree as flow YAML that quotes only what must be."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key or '_'}: {written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if not isinstance(value, int | float)
        else str(value)
    )


def only_zoo_errors(recipe, edits=()):
    """Load and look at the training; nothing but a ZooError may come out, and it can be printed."""
    try:
        train_faults(load(recipe, edits))
    except ZooError as error:
        assert str(error) and error.diagnostics and all(f.code.startswith("AZ") for f in error.diagnostics)


fuzz = settings(
    max_examples=4 * settings.default.max_examples, deadline=None, suppress_health_check=list(HealthCheck)
)


@fuzz
@given(mutated())
def test_fuzz_trees(tree):
    only_zoo_errors(written(tree) + "\n")
    only_zoo_errors(tree)


@fuzz
@given(st.text(max_size=300))
def test_fuzz_text(text):
    only_zoo_errors(f"{text}\n")
    only_zoo_errors(text)
    only_zoo_errors("ham_a", [text])


@fuzz
@given(st.binary(max_size=300))
def test_fuzz_bytes(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_bytes(data)
    only_zoo_errors(file)


@fuzz
@given(st.text(alphabet="{}[]:,-?&*!|>'\"%@`#\n \tab1.~", max_size=120))
def test_fuzz_punctuation(text):
    only_zoo_errors(f"{text}\n")
    only_zoo_errors(f"recipe: 1\nattention: {text}\n")

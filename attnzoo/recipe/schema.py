"""What a recipe may say. Data only: names from the zoo, never import paths, nothing is evaluated."""

from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

VERSION = 1
"""Version of the format; `recipe:` says for which one a recipe was written."""
MAX_BRANCHES = 16
MAX_MECHANISMS = 64
"""So many may be merged in one spec, however its fusions are nested."""
USE, FUSE = "(use)", "(fuse)"
VIT, CCT, PYRAMID, DUAL = "(vit)", "(cct)", "(pyramid)", "(dual)"
SEQ2SEQ, SEQUENCE = "(seq2seq)", "(sequence)"
COUNT, LIST, HALVING, SIDES = "(count)", "(list)", "(schedule)", "(sides)"
SCALE, PAIR, FEATURES, TOKENS, GIVEN = "(scale)", "(pair)", "(features)", "(tokens)", "(given)"
LAYERS, SIDE_LAYERS, VOCAB, SIDE_VOCAB = "(layers)", "(layers by side)", "(vocab)", "(vocab by side)"
"""Tags of the kinds of spec, of host, of second stream and of counts, which cannot be mistaken for keys."""

# A text beside a Field says in words what is wanted, where its limits would not.
Name = Annotated[
    str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$"), "a name of a-z, 0-9 and _ that begins with a letter"
]  # fmt: skip
ComponentName = Annotated[str, Field(min_length=1, max_length=130), "the name of a component of the zoo"]
Base = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,100}$"), "the name of a timm model, without a tag"]
Text = Annotated[str, Field(max_length=1000)]
Line = Annotated[str, Field(pattern=r"^[^\n]{0,1000}\n?$"), "one line of at most 1000 characters"]
Heads = Annotated[int, Field(ge=1, le=1024)]
Rate = Annotated[float, Field(ge=0, lt=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class Use(_Strict):
    """One mechanism, by name. A plain string is short for `{use: ...}`."""

    use: ComponentName = Field(description="Name of a mechanism, or plugin/name.")
    with_: dict[str, Any] = Field(default_factory=dict, alias="with", description="Its options.")
    heads: Heads | None = Field(None, description="Heads, instead of the host's number.")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"use": value} if isinstance(value, str) else value


class Fuse(_Strict):
    """Several mechanisms, merged."""

    fuse: ComponentName = Field(description="Name of a fusion, or plugin/name.")
    of: list["Spec"] = Field(min_length=1, max_length=MAX_BRANCHES, description="The branches.")
    with_: dict[str, Any] = Field(default_factory=dict, alias="with", description="Options of the fusion.")
    heads: Heads | None = Field(None, description="Heads, instead of the host's number.")
    level: Literal["heads", "tokens"] | None = Field(
        None, description="Where branches meet; inside the heads when all of them can, unless said otherwise."
    )


def spec_tag(value: Any) -> str | None:
    """Which kind of spec a raw value means to be, by its tag."""
    if isinstance(value, (str, Use)):
        return USE
    if isinstance(value, Fuse):
        return FUSE
    if isinstance(value, dict):
        return FUSE if "fuse" in value or "of" in value else USE if "use" in value else None
    return None


Spec = Annotated[
    Union[Annotated[Use, Tag(USE)], Annotated[Fuse, Tag(FUSE)]],  # noqa: UP007 - a union of forward references
    Discriminator(spec_tag, custom_error_type="spec", custom_error_message="neither `use` nor `fuse`"),
]
Fuse.model_rebuild()

Means = Annotated[list[Annotated[float, Field(ge=-10, le=10)]], Field(min_length=1, max_length=1024)]
Deviations = Annotated[list[Annotated[float, Field(ge=1e-4, le=10)]], Field(min_length=1, max_length=1024)]
Side = Annotated[int, Field(ge=1, le=4096)]


class VitModel(_Strict):
    """Arguments of timm's `VisionTransformer` that a recipe may set; the base's own hold otherwise.

    For a base that timm builds as an `Eva` they are said in its words.
    """

    img_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    patch_size: Annotated[int, Field(ge=1, le=1024)] | None = None
    in_chans: Annotated[int, Field(ge=1, le=1024)] | None = None
    num_classes: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    global_pool: Literal["", "avg", "avgmax", "max", "token", "map", "prr"] | None = None
    embed_dim: Annotated[int, Field(ge=1, le=8192)] | None = None
    depth: Annotated[int, Field(ge=1, le=96)] | None = None
    num_heads: Heads | None = None
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] | None = None
    qkv_bias: bool | None = None
    qk_norm: bool | None = None
    proj_bias: bool | None = None
    init_values: Annotated[float, Field(gt=0, le=10)] | None = None
    class_token: bool | None = None
    pos_embed: Literal["learn", "none"] | None = None
    no_embed_class: bool | None = None
    reg_tokens: Annotated[int, Field(ge=0, le=256)] | None = None
    pre_norm: bool | None = None
    final_norm: bool | None = None
    fc_norm: bool | None = None
    dynamic_img_size: bool | None = None
    dynamic_img_pad: bool | None = None
    drop_rate: Rate | None = None
    pos_drop_rate: Rate | None = None
    patch_drop_rate: Rate | None = None
    proj_drop_rate: Rate | None = None
    attn_drop_rate: Rate | None = None
    drop_path_rate: Rate | None = None
    norm_layer: Literal["layernorm", "rmsnorm", "simplenorm"] | None = None
    norm_eps: Annotated[float, Field(gt=0, le=1)] | None = None
    act_layer: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "mish", "hard_swish"] | None = None
    weight_init: Literal["", "skip", "jax", "jax_nlhb", "moco"] | None = None


class CctModel(_Strict):
    """Arguments of `CompactTransformer` that a recipe may set; the base's own hold otherwise."""

    img_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    in_chans: Annotated[int, Field(ge=1, le=1024)] | None = None
    num_classes: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    embed_dim: Annotated[int, Field(ge=1, le=8192)] | None = None
    depth: Annotated[int, Field(ge=1, le=96)] | None = None
    num_heads: Heads | None = None
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] | None = None
    n_conv_layers: Annotated[int, Field(ge=1, le=8)] | None = None
    kernel_size: Annotated[int, Field(ge=1, le=31)] | None = None
    n_conv_blocks: Annotated[int, Field(ge=0, le=95)] | None = None
    pos_embed: Literal["learn", "sine"] | None = None
    qkv_bias: bool | None = None
    drop_rate: Rate | None = None
    pos_drop_rate: Rate | None = None
    proj_drop_rate: Rate | None = None
    attn_drop_rate: Rate | None = None
    drop_path_rate: Rate | None = None


class SecondStream(_Strict):
    """What the second stream of a `dual` model is."""

    stream: Literal["scale", "pair", "features", "tokens", "given"] = Field(
        description="The same image at another scale, another image of the batch, the same image through convolutions, "
        "learnt tokens, or what the caller hands over."
    )


class ScaleStream(SecondStream):
    """The same image in patches of another size."""

    patch_size: Annotated[int, Field(ge=1, le=1024)] = Field(description="Side of the patches, in pixels.")


class PairStream(SecondStream):
    """Another image of the batch, in training only."""


class FeaturesStream(SecondStream):
    """The same image through convolutions."""

    n_conv_layers: Annotated[int, Field(ge=1, le=8)] = Field(2, description="How many convolutions.")
    kernel_size: Annotated[int, Field(ge=1, le=31)] = Field(3, description="Their side, in pixels.")


class TokensStream(SecondStream):
    """Learnt tokens, the same for every image."""

    count: Annotated[int, Field(ge=1, le=65_536)] = Field(description="How many.")


class GivenStream(SecondStream):
    """What the caller hands over with the images."""

    name: Name = Field("b", description="What the argument of the model's forward is called.")
    channels: Annotated[int, Field(ge=1, le=65_536)] = Field(description="Channels of what is handed over.")
    size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] = Field(
        description="How many tokens (b m c), or rows and columns of a feature map (b c y x)."
    )


_STREAMS = {"scale": SCALE, "pair": PAIR, "features": FEATURES, "tokens": TOKENS, "given": GIVEN}
_KEYS = {
    SCALE: ScaleStream.model_fields.keys(),
    FEATURES: FeaturesStream.model_fields.keys(),
    TOKENS: TokensStream.model_fields.keys(),
    GIVEN: GivenStream.model_fields.keys(),
}


def stream_tag(value: Any) -> str:
    """Which second stream a raw value means to be, by its tag; by its other keys where it says none that is known."""
    kind = value.get("stream") if isinstance(value, dict) else getattr(value, "stream", None)
    if isinstance(kind, str) and kind in _STREAMS:
        return _STREAMS[kind]
    keys = value.keys() - {"stream"} if isinstance(value, dict) else set()
    return next((tag for tag, known in _KEYS.items() if keys & known), PAIR)


StreamB = Annotated[
    Annotated[ScaleStream, Tag(SCALE)]
    | Annotated[PairStream, Tag(PAIR)]
    | Annotated[FeaturesStream, Tag(FEATURES)]
    | Annotated[TokensStream, Tag(TOKENS)]
    | Annotated[GivenStream, Tag(GIVEN)],
    Discriminator(stream_tag),
    "a mapping that says which `stream` it is: scale, pair, features, tokens or given",
]


class DualModel(_Strict):
    """Arguments of `DualTransformer` that a recipe may set; the base's own hold otherwise."""

    img_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    patch_size: Annotated[int, Field(ge=1, le=1024)] | None = None
    b: StreamB | None = None
    in_chans: Annotated[int, Field(ge=1, le=1024)] | None = None
    num_classes: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    global_pool: Literal["", "avg", "token"] | None = None
    class_token: bool | None = None
    embed_dim: Annotated[int, Field(ge=1, le=8192)] | None = None
    depth: Annotated[int, Field(ge=1, le=96)] | None = None
    num_heads: Heads | None = None
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] | None = None
    qkv_bias: bool | None = None
    init_values: Annotated[float, Field(gt=0, le=10)] | None = None
    drop_rate: Rate | None = None
    pos_drop_rate: Rate | None = None
    proj_drop_rate: Rate | None = None
    attn_drop_rate: Rate | None = None
    drop_path_rate: Rate | None = None


Stages = Annotated[list[Annotated[int, Field(ge=1, le=8192)]], Field(min_length=1, max_length=8)]
Ratios = Annotated[list[Annotated[float, Field(ge=0, le=64)]], Field(min_length=1, max_length=8)]
Depths = Annotated[list[Annotated[int, Field(ge=1, le=96)]], Field(min_length=1, max_length=8)]
StageHeads = Annotated[list[Heads], Field(min_length=1, max_length=8)]


class PyramidModel(_Strict):
    """Arguments of `PyramidTransformer` that a recipe may set; the base's own hold otherwise."""

    img_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    patch_size: Annotated[int, Field(ge=1, le=1024)] | None = None
    in_chans: Annotated[int, Field(ge=1, le=1024)] | None = None
    num_classes: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    dims: Stages | None = None
    depths: Depths | None = None
    num_heads: StageHeads | None = None
    mlp_ratios: Ratios | None = None
    stem: Literal["patch", "overlap", "conv"] | None = None
    stem_dim: Annotated[int, Field(ge=1, le=8192)] | None = None
    merge: Literal["patch", "overlap", "deformable"] | None = None
    norm: Literal["layer", "group", "batch"] | None = None
    block_norm: Literal["layer", "group", "batch", "none"] | None = None
    end_norm: Literal["last", "every", "none"] | None = None
    block: Literal["transformer", "bottleneck", "frequency"] | None = None
    mlp: Literal["plain", "depthwise", "inverted", "multi_group"] | None = None
    depthwise: bool | None = None
    shared: bool | None = None
    pos_embed: Literal["learn", "none"] | None = None
    qkv_bias: bool | None = None
    init_values: Annotated[float, Field(gt=0, le=10)] | None = None
    drop_rate: Rate | None = None
    proj_drop_rate: Rate | None = None
    attn_drop_rate: Rate | None = None
    drop_path_rate: Rate | None = None


Kind = Literal["vit", "cct", "pyramid", "dual", "seq2seq", "sequence"]
"""In all hosts, so that a fault names all kinds; `host_tag` tells them apart."""


class _Host(_Strict):
    kind: Kind
    base: Base
    model: VitModel | CctModel | PyramidModel | DualModel
    init: Literal["timm", "normal"] = Field(
        "timm",
        description="timm's initialisation, or N(0, 0.02²) for all weights and tokens and 0 for all biases.",
    )
    mean: Means | None = Field(None, description="Mean of the images by channel, of 1; the base's otherwise.")
    std: Deviations | None = Field(None, description="Standard deviation of the images by channel, of 1.")
    registers: Name | None = Field(None, description="Name under which timm.create_model knows the model.")

    @property
    def arguments(self) -> dict[str, Any]:
        """What the recipe says of `model`, and nothing else."""
        return self.model.model_dump(exclude_unset=True, exclude_none=True)


class VitHost(_Host):
    """A timm backbone built on `VisionTransformer` or `Eva`."""

    base: Base = Field(
        "vit_base_patch16_224",
        description="A timm model built on VisionTransformer or Eva; its arguments are the defaults.",
    )
    model: VitModel = Field(default_factory=VitModel, description="Arguments that differ from the base's.")


class CctHost(_Host):
    """A Compact Convolutional Transformer."""

    base: Base = Field("cct_7_3x1", description="One of the authors' sizes; its arguments are the defaults.")
    model: CctModel = Field(default_factory=CctModel, description="Arguments that differ from the base's.")


class PyramidHost(_Host):
    """A backbone in stages."""

    base: Base = Field(
        "pyramid_small_patch4_224", description="One of its sizes; its arguments are the defaults."
    )
    model: PyramidModel = Field(
        default_factory=PyramidModel, description="Arguments that differ from the base's."
    )


class DualHost(_Host):
    """A backbone with two streams of tokens."""

    base: Base = Field(
        "dual_small_patch16_224", description="One of its sizes; its arguments are the defaults."
    )
    model: DualModel = Field(default_factory=DualModel, description="Arguments that differ from the base's.")


Dim = Annotated[int, Field(ge=1, le=65_536)]
Layers = Annotated[int, Field(ge=1, le=256)]
Vocab = Annotated[int, Field(ge=4, le=10_000_000)]
Length = Annotated[int, Field(ge=2, le=1_000_000)]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "mish", "hard_swish"]
Positions = Literal["sinusoidal", "learned", "rotary", "none"]


class _SequenceHost(_Strict):
    kind: Kind
    dim: Dim = Field(512, description="Width of the tokens, in channels.")
    mlp_dim: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        2048, description="Hidden width of the MLPs; 0 for none."
    )
    max_length: Length = Field(350, description="Longest sequence, in tokens, beginning and end included.")
    positions: Positions = Field(
        "sinusoidal", description="Added to the embeddings, or turned inside the heads."
    )
    norm_first: bool = Field(True, description="Norms before sublayers, or after their sum with the tokens.")
    act: Activation = Field("relu", description="Activation of the MLPs.")
    dropout: Rate = Field(0.1, description="Of attention weights, in MLPs and of what sublayers give.")
    bias: bool = Field(True, description="Whether Linear layers have biases.")


class SideLayers(_Strict):
    """How many layers each side has."""

    encoder: Layers = Field(6, description="Of the encoder.")
    decoder: Layers = Field(6, description="Of the decoder.")


class SideVocab(_Strict):
    """How many ids each side has."""

    source: Vocab = Field(8000, description="Of the source.")
    target: Vocab = Field(8000, description="Of the target.")


BothLayers = Annotated[
    Annotated[Layers, Tag(LAYERS)] | Annotated[SideLayers, Tag(SIDE_LAYERS)],
    Discriminator(lambda value: SIDE_LAYERS if isinstance(value, dict | SideLayers) else LAYERS),
    "a whole number from 1 to 256, or one for `encoder` and one for `decoder`",
]
BothVocab = Annotated[
    Annotated[Vocab, Tag(VOCAB)] | Annotated[SideVocab, Tag(SIDE_VOCAB)],
    Discriminator(lambda value: SIDE_VOCAB if isinstance(value, dict | SideVocab) else VOCAB),
    "a whole number from 4 on, or one for `source` and one for `target`",
]


class Seq2SeqHost(_SequenceHost):
    """An encoder and a decoder."""

    layers: BothLayers = Field(6, description="Of encoder and decoder, or of each.")
    vocab: BothVocab = Field(
        8000, description="Ids of source and target, or of each; set by the data when trained."
    )
    tie: Literal["none", "target", "all"] = Field(
        "none", description="Whether the output layer shares the target's embedding, or both sides have one."
    )
    norm: Literal["layer", "scalar"] = Field(
        "layer", description="LayerNorm, or Deep Head's with one gain for all channels."
    )
    scale_embedding: bool = Field(
        True, description="Whether embeddings are multiplied by the root of the width."
    )


class SequenceHost(_SequenceHost):
    """One stack of layers over one sequence."""

    dim: Dim = Field(64, description="Width of the tokens, in channels.")
    mlp_dim: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        256, description="Hidden width of the MLPs; 0 for none."
    )
    max_length: Length = Field(64, description="Longest sequence.")
    positions: Positions = Field(
        "learned", description="Added to the embeddings, or turned inside the heads."
    )
    act: Activation = Field("gelu", description="Activation of the MLPs.")
    dropout: Rate = Field(0.0, description="Of attention weights, in MLPs and of what sublayers give.")
    layers: Layers = Field(2, description="How many.")
    vocab: Annotated[int, Field(ge=0, le=10_000_000)] = Field(
        8, description="Ids of the tokens that come in; 0 for vectors. Set by the data when it is trained."
    )
    width: Annotated[int, Field(ge=0, le=65_536)] = Field(
        0,
        description="Channels of the vectors that come in; 0 for tokens. Set by the data when it is trained.",
    )
    outputs: Annotated[int, Field(ge=1, le=10_000_000)] = Field(
        8, description="Classes, or channels of what goes out. Set by the data when it is trained."
    )
    causal: bool = Field(True, description="Whether a position sees only itself and what came before.")

    @model_validator(mode="after")
    def _one_input(self) -> "SequenceHost":
        if (self.vocab > 0) == (self.width > 0):
            raise ValueError("either tokens come in (`vocab`) or vectors (`width`); the other is 0")
        return self


_KINDS = {"cct": CCT, "pyramid": PYRAMID, "dual": DUAL, "seq2seq": SEQ2SEQ, "sequence": SEQUENCE}


def host_tag(value: Any) -> str:
    """Which kind of host a raw value means to be, by its tag; what says nothing known is measured as a ViT."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return _KINDS.get(kind, VIT) if isinstance(kind, str) else VIT


ImageHost = VitHost | CctHost | PyramidHost | DualHost
Host = Annotated[
    Annotated[VitHost, Tag(VIT)]
    | Annotated[CctHost, Tag(CCT)]
    | Annotated[PyramidHost, Tag(PYRAMID)]
    | Annotated[DualHost, Tag(DUAL)]
    | Annotated[Seq2SeqHost, Tag(SEQ2SEQ)]
    | Annotated[SequenceHost, Tag(SEQUENCE)],
    Discriminator(host_tag),
]


class HeadSchedule(_Strict):
    """Head counts that follow a rule from layer to layer."""

    schedule: Literal["constant", "halving"] = Field(
        description="The same in every layer, or half of the layer before."
    )
    first: Heads = Field(description="Of the first layer.")
    last: Heads | None = Field(None, description="Of the last layer, from which halving stops; a lock.")


def heads_tag(value: Any) -> str:
    """Which way of saying head counts a raw value means, by its tag."""
    if isinstance(value, list):
        return LIST
    if isinstance(value, HeadSchedule) or (
        isinstance(value, dict) and ({"schedule", "first", "last"} & value.keys())
    ):
        return HALVING
    return SIDES if isinstance(value, dict | SideHeads) else COUNT


HeadList = Annotated[list[Heads], Field(min_length=1, max_length=256)]
OneSide = Annotated[
    Annotated[Heads, Tag(COUNT)] | Annotated[HeadList, Tag(LIST)] | Annotated[HeadSchedule, Tag(HALVING)],
    Discriminator(heads_tag),
    "a whole number, a list with a number for each layer, or a schedule",
]


class SideHeads(_Strict):
    """Head counts of the encoder and of the decoder."""

    encoder: OneSide = Field(8, description="Of each layer of the encoder.")
    decoder: OneSide = Field(8, description="Of each layer of the decoder.")


HeadCounts = Annotated[
    Annotated[Heads, Tag(COUNT)]
    | Annotated[HeadList, Tag(LIST)]
    | Annotated[HeadSchedule, Tag(HALVING)]
    | Annotated[SideHeads, Tag(SIDES)],
    Discriminator(heads_tag),
    "a whole number, a list with a number for each layer, a schedule, or one of these for `encoder` and `decoder`",
]


class SkipSpec(_Strict):
    """What the attention of a layer hands on to the next. A plain string is short for `{use: ...}`."""

    use: Literal[
        "none",
        "merged",
        "merged_raw",
        "merged_post",
        "probs_pairmean",
        "logits_pairmean",
        "cross",
        "encoder_stack",
    ] = Field(description="Which variant of Deep Head's skip.")
    at: Annotated[str, Field(min_length=1, max_length=100)] | None = Field(
        None, description="A glob over site names; the encoder's, or all blocks, when left out."
    )
    encoders: Annotated[int, Field(ge=2, le=64)] = Field(
        2, description="Of `encoder_stack`: how many encoders."
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"use": value} if isinstance(value, str) else value


TAGGED: dict[str, Any] = {
    USE: Use,
    FUSE: Fuse,
    VIT: VitHost,
    CCT: CctHost,
    PYRAMID: PyramidHost,
    DUAL: DualHost,
    SCALE: ScaleStream,
    PAIR: PairStream,
    FEATURES: FeaturesStream,
    TOKENS: TokensStream,
    GIVEN: GivenStream,
    SEQ2SEQ: Seq2SeqHost,
    SEQUENCE: SequenceHost,
    COUNT: Heads,
    LIST: HeadList,
    HALVING: HeadSchedule,
    SIDES: SideHeads,
    LAYERS: Layers,
    SIDE_LAYERS: SideLayers,
    VOCAB: Vocab,
    SIDE_VOCAB: SideVocab,
}
"""What a tag stands for."""


class Transform(_Strict):
    """One step of the augmentation of training images, by name."""

    use: ComponentName = Field(description="Name of the step.")
    with_: dict[str, Any] = Field(default_factory=dict, alias="with", description="Its options.")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"use": value} if isinstance(value, str) else value


class Tokens(_Strict):
    """How text becomes ids."""

    use: Literal["bpe", "word"] = Field(
        default="bpe", description="Byte-pair encoding, or words and punctuation."
    )
    size: Annotated[int, Field(ge=300, le=1_000_000)] = Field(default=8000, description="Most ids.")
    min_frequency: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        default=2, description="How often a piece must occur in the training texts."
    )
    shared: bool = Field(default=True, description="One vocabulary for both sides, or one for each.")


class Optimizer(_Strict):
    """One of timm's optimisers."""

    use: Name = Field(default="adamw", description="Its name in timm.")
    lr: Annotated[float, Field(gt=0, le=100)] = Field(default=1e-3, description="Learning rate.")
    weight_decay: Annotated[float, Field(ge=0, le=10)] = Field(
        default=0.01, description="Of weights; biases, norms and what the model names stay without."
    )
    betas: Annotated[list[Rate], Field(min_length=2, max_length=2)] | None = Field(
        default=None, description="Decay of the two moments; the optimiser's own otherwise."
    )
    eps: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Added to the root of the second moment; the optimiser's own otherwise."
    )


class Schedule(_Strict):
    """How the learning rate changes from step to step."""

    use: Literal["constant", "cosine", "inverse_sqrt"] = Field(
        default="constant", description="After the warm-up."
    )
    warmup: Annotated[float, Field(ge=0, le=10_000)] = Field(
        default=0.0, description="Linear rise at the beginning, in epochs."
    )
    start: Annotated[float, Field(ge=0, le=100)] = Field(default=1e-6, description="Rate the rise begins at.")
    end: Annotated[float, Field(ge=0, le=100)] = Field(default=0.0, description="Rate the cosine ends at.")


class Train(_Strict):
    """How the model is trained."""

    data: Annotated[str, Field(min_length=1, max_length=1000)] = Field(
        default="cifar10", description="Images, sentence pairs or sequences, by name."
    )
    tokens: Tokens = Field(default_factory=Tokens, description="How text becomes ids.")
    size: Side | None = Field(default=None, description="Side of the images, in pixels; the data's own.")
    augment: list[Transform] = Field(
        default_factory=list, max_length=32, description="Augmentation, step by step."
    )
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        default=256, description="Images, pairs or sequences per optimiser step, over all processes."
    )
    accumulate: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=1, description="Microbatches that a process computes its share of a batch in, to save memory."
    )
    epochs: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        default=100, description="Passes over the training side; the schedule spans them."
    )
    optimizer: Optimizer = Field(default_factory=Optimizer, description="The optimiser.")
    schedule: Schedule = Field(default_factory=Schedule, description="Of the learning rate.")
    method: Literal["dual_cross"] | None = Field(
        default=None, description="A method of a paper, with classifiers and losses of its own."
    )
    label_smoothing: Rate = Field(default=0.0, description="Share of a target that goes to all classes.")
    auxiliary: Annotated[float, Field(ge=0, le=1e9)] = Field(
        default=0.01, description="Weight of the losses that mechanisms add; of their mean."
    )
    clip_grad: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        default=None, description="Largest norm of the gradient."
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Decay per step of a moving average of the weights, which is then evaluated.",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="Of the forward pass.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        default=0, description="Of the initial weights, the order, augmentation and dropout."
    )


class Override(_Strict):
    """Something else at some sites. Later entries win."""

    at: Annotated[str, Field(min_length=1, max_length=100)] = Field(
        description="A glob over site names: blocks.*"
    )
    put: Spec | None = Field(description="What is put there; null for nothing, where a host can do without.")


class Expect(_Strict):
    """A lock: composing fails when it does not hold."""

    params: Annotated[int, Field(ge=0)] | None = Field(None, description="Number of parameters.")


def _whole(value: Any) -> Any:
    """The value, unless Python takes it for a whole number that it is not: `true == 1 == 1.0`."""
    if isinstance(value, bool | float):
        raise PydanticCustomError("int_type", "no whole number")
    return value


class Recipe(_Strict):
    """Which mechanism goes to which site of which host."""

    recipe: Annotated[Literal[1], BeforeValidator(_whole)] = Field(description="Version of this format.")
    name: Name | None = Field(None, description="The file's stem.")
    summary: Line = Field("", description="One line.")
    source: Text = Field("", description="Paper, with sections.")
    extends: Text | None = Field(None, description="A recipe whose entries hold where this one says nothing.")
    host: Host = Field(description="The model that is composed.")
    heads: HeadCounts | None = Field(None, description="Heads by layer, in the place of the host's number.")
    skip: SkipSpec | None = Field(None, description="What the attention of a layer hands on to the next.")
    attention: Spec = Field(description="What is put at every site ...")
    overrides: list[Override] = Field(
        default_factory=list, max_length=256, description="... except where these say."
    )
    pool: Spec | None = Field(
        None, description="What makes one token of all, in the place of the host's own way."
    )
    expect: Expect = Field(Expect(params=None), description="What must come out.")
    train: Train = Field(default_factory=Train, description="How the model is trained.")

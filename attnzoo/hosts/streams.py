"""The two streams of a `dual` model: what their tokens are made of, and a layer that both go through."""

from collections.abc import Mapping, Sequence

import torch
from timm.layers import DropPath, LayerScale, PatchEmbed, trunc_normal_
from torch import Tensor, nn

from attnzoo.core import Layout
from attnzoo.errors import RecipeError
from attnzoo.hosts.compact_transformer import ConvTokenizer
from attnzoo.hosts.given import handed_over


class Stream(nn.Module):
    """The tokens of a stream. Concrete ones say how they are arranged, and of what they are made.

    Args:
        layout: How the tokens are arranged.
        dim: Width of the tokens, in channels.
        positions: Whether each place has a learnt vector of its own, which is added.
    """

    words = ""
    """Of what the tokens are made, for people; empty when they are all there is."""

    def __init__(self, layout: Layout, dim: int, positions: bool = True):
        super().__init__()
        self.layout = layout
        if layout.prefix:
            self.cls_token = nn.Parameter(torch.empty(1, layout.prefix, dim))
        if positions:
            self.pos_embed = nn.Parameter(torch.empty(1, layout.length, dim))

    def init_weights(self) -> None:
        """Tokens and positions from N(0, 0.02²)."""
        for parameter in self._parameters.values():
            if parameter is not None:
                trunc_normal_(parameter, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Tokens and positions, as with timm's models."""
        return set(self._parameters)

    def placed(self, tokens: Tensor) -> Tensor:
        """Special tokens before the tokens of the grid (b n c), and positions on all."""
        if self.layout.prefix:
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return tokens + self.pos_embed

    def forward(self, images: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """Tokens (b n c).

        Args:
            images: (b c y x).
            given: What the caller handed over with them, by name.
        """
        raise NotImplementedError


class Patches(Stream):
    """The image in square patches, with a class token if wanted.

    Args:
        img_size: Rows and columns of the image.
        patch_size: Side of a patch; divides both.
        in_chans: Channels of the image.
        dim: Width of the tokens, in channels.
        class_token: Whether there is one.
    """

    def __init__(
        self, img_size: tuple[int, int], patch_size: int, in_chans: int, dim: int, class_token: bool
    ):
        rows, columns = img_size
        super().__init__(Layout((rows // patch_size, columns // patch_size), int(class_token)), dim)
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, dim)
        self.words = f"the same image in patches of {patch_size} × {patch_size}"

    def forward(self, images: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        return self.placed(self.patch_embed(images))


class Features(Stream):
    """What a few convolutions find in the image: n × [convolution, ReLU, max pooling], as in `cct`.

    Args:
        img_size: Rows and columns of the image.
        in_chans: Channels of the image.
        dim: Width of the tokens, in channels.
        n_conv_layers: How many convolutions; each halves the sides, or more.
        kernel_size: Their side.
    """

    def __init__(
        self, img_size: tuple[int, int], in_chans: int, dim: int, n_conv_layers: int, kernel_size: int
    ):
        stem = ConvTokenizer(img_size, in_chans, dim, n_conv_layers, kernel_size)
        super().__init__(Layout(stem.grid), dim)
        self.stem = stem
        self.words = f"the same image through {n_conv_layers} convolution{'s' * (n_conv_layers > 1)}"

    def init_weights(self) -> None:
        """He's initialisation of the convolutions; positions from N(0, 0.02²)."""
        super().init_weights()
        self.stem.init_weights()

    def forward(self, images: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        return self.placed(self.stem(images))


class Tokens(Stream):
    """Learnt tokens, the same for every image: classes, a dictionary.

    Args:
        count: How many.
        dim: Their width, in channels.
    """

    def __init__(self, count: int, dim: int):
        super().__init__(Layout((count,)), dim, positions=False)
        self.tokens = nn.Parameter(torch.empty(1, count, dim))

    def forward(self, images: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        return self.tokens.expand(images.shape[0], -1, -1)


class Given(Stream):
    """What the caller hands over with the images, projected to the width of the tokens.

    Args:
        name: What the argument of the model's `forward` is called.
        channels: Of what is handed over.
        size: Rows and columns of a feature map (b c y x), or the number of tokens (b m c).
        dim: Width of the tokens, in channels.
    """

    def __init__(self, name: str, channels: int, size: int | Sequence[int], dim: int):
        grid = (size,) if isinstance(size, int) else tuple(size)
        super().__init__(Layout(grid), dim)
        self.shape = (*grid, channels) if len(grid) == 1 else (channels, *grid)
        self.name, self.proj = name, nn.Linear(channels, dim)
        self.words = f"`{name}` of the caller"

    def forward(self, images: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        values = handed_over(given, self.name, images, self.shape)
        tokens = values if len(self.shape) == 2 else values.flatten(2).transpose(1, 2)
        return self.placed(self.proj(tokens))


def second_stream(
    img_size: tuple[int, int],
    in_chans: int,
    dim: int,
    class_token: bool,
    *,
    stream: str,
    patch_size: int = 16,
    n_conv_layers: int = 2,
    kernel_size: int = 3,
    count: int = 16,
    name: str = "b",
    channels: int = 64,
    size: int | Sequence[int] = 16,
) -> Stream | None:
    """Stream b; None for `pair`, whose tokens are made as those of stream a.

    Args:
        img_size: Rows and columns of the image.
        in_chans: Channels of the image.
        dim: Width of the tokens, in channels.
        class_token: Whether a image in patches has one.
        stream: `scale`, `pair`, `features`, `tokens` or `given`.
        patch_size: Of `scale`.
        n_conv_layers, kernel_size: Of `features`.
        count: Of `tokens`.
        name, channels, size: Of `given`.

    Raises:
        RecipeError: AZ322, when it cannot be made of such a image.
    """
    if stream == "pair":
        return None
    if stream == "scale":
        check_patches(img_size, patch_size, "AZ322")
        return Patches(img_size, patch_size, in_chans, dim, class_token)
    if stream == "features":
        return Features(img_size, in_chans, dim, n_conv_layers, kernel_size)
    if stream == "tokens":
        return Tokens(count, dim)
    if stream == "given":
        return Given(name, channels, size, dim)
    raise ValueError(f"there is no second stream `{stream}`")


def check_patches(img_size: tuple[int, int], patch_size: int, code: str) -> None:
    """Refuse patches that do not tile a image.

    Args:
        img_size: Rows and columns of the image.
        patch_size: Side of a patch.
        code: Of the fault: AZ320 for stream a, AZ322 for stream b.

    Raises:
        RecipeError: AZ320 or AZ322.
    """
    rows, columns = img_size
    if rows % patch_size or columns % patch_size:
        raise RecipeError(
            code,
            f"an image of {rows} × {columns} pixels cannot be cut into patches of {patch_size} × {patch_size}",
            why="" if code == "AZ320" else "stream b is the same image at another scale",
            help="let both sides of the image be multiples of `patch_size`",
        )


class Sublayers(nn.Module):
    """What a stream goes through in a layer, each sublayer with its norm, its scale and its residual.

    Args:
        layout: How the stream's tokens are arranged.
        dim: Their width, in channels.
        attn: At the site of self-attention; None for none.
        cross: At the site of attention to the other stream; None for none.
        meets: Whether either stream reads the other here.
        mlp: The MLP; None for none.
        init_values: What the scales of the sublayers start with; None for no scales.
        drop_path: Share of samples that skip a sublayer in training.
    """

    def __init__(
        self,
        layout: Layout,
        dim: int,
        attn: nn.Module | None,
        cross: nn.Module | None,
        meets: bool,
        mlp: nn.Module | None,
        init_values: float | None,
        drop_path: float,
    ):
        super().__init__()

        def scale() -> nn.Module:
            return nn.Identity() if init_values is None else LayerScale(dim, init_values)

        self.layout = layout
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.attn, self.cross, self.mlp = attn, cross, mlp
        if attn is not None:
            self.norm1, self.ls1 = nn.LayerNorm(dim), scale()
        if meets:
            self.norm_cross = nn.LayerNorm(dim)
        if cross is not None:
            self.ls_cross = scale()
        if mlp is not None:
            self.norm2, self.ls2 = nn.LayerNorm(dim), scale()

    def attend(self, x: Tensor, partner: Tensor | None = None) -> Tensor:
        """x + self(LN(x)), (b n c).

        Args:
            x: (b n c).
            partner: What joins the own tokens as keys, where the attention reads both: those of another image (b n c);
                nothing if None.
        """
        if self.attn is None:
            return x
        own = self.norm1(x)
        if getattr(self.attn, "context_dim", None) is None:
            mixed = self.attn(own, layout=self.layout)
        elif partner is None:
            mixed = self.attn(own, own[:, :0], layout=self.layout, context_layout=Layout((0,)))
        else:
            mixed = self.attn(own, self.norm1(partner), layout=self.layout, context_layout=self.layout)
        return x + self.drop_path(self.ls1(mixed))

    def read(self, x: Tensor, own: Tensor, other: Tensor, layout: Layout) -> Tensor:
        """x + cross(own, other), (b n c).

        Args:
            x: (b n c).
            own: x normalised.
            other: The other stream, normalised, (b m c).
            layout: How the other stream is arranged.
        """
        if self.cross is None:
            return x
        read = self.cross(own, other, layout=self.layout, context_layout=layout)
        return x + self.drop_path(self.ls_cross(read))

    def think(self, x: Tensor) -> Tensor:
        """x + MLP(LN(x)), (b n c)."""
        return x if self.mlp is None else x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class DualBlock(nn.Module):
    """One layer of both streams.

    Args:
        a: What stream a goes through.
        b: What stream b goes through; None where it goes through a's, without reading.
    """

    def __init__(self, a: Sublayers, b: Sublayers | None):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Both streams after the layer; of a alone, nothing is read.

        Args:
            a: (b n c).
            b: (b m c), or None.
        """
        if b is None:
            return self.a.think(self.a.attend(a)), None
        other = self.a if self.b is None else self.b
        a, b = self.a.attend(a, b), other.attend(b)
        if hasattr(self.a, "norm_cross"):
            u, v = self.a.norm_cross(a), other.norm_cross(b)
            a = self.a.read(a, u, v, other.layout)
            b = b if self.b is None else self.b.read(b, v, u, self.a.layout)
        return self.a.think(a), other.think(b)

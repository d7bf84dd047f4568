"""Ids and text: a fixed list of symbols, or a tokenizer that was trained."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal

from attnzoo.errors import DataError

PAD, BOS, EOS, UNK = range(4)
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
"""What the first four ids mean in every vocabulary: padding, beginning, end, unknown."""
Kind = Literal["bpe", "word"]


class Vocabulary(ABC):
    """Ids for text and text for ids."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of ids, the special ones among them."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, without beginning and end."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; the special ones are left out."""

    @abstractmethod
    def words(self, ids: Sequence[int]) -> list[str]:
        """A piece of text for each id, the special ones as `<s>`; to be shown."""

    @abstractmethod
    def as_data(self) -> dict[str, Any]:
        """The vocabulary as JSON, from which `of` makes it again."""

    @staticmethod
    def of(data: dict[str, Any]) -> "Vocabulary":
        """A vocabulary from `as_data`."""
        return Symbols(data["symbols"]) if "symbols" in data else Subwords(data["tokenizer"])


class Symbols(Vocabulary):
    """A fixed list of symbols; in a text they stand between spaces. Ids follow the special ones.

    Args:
        symbols: None holds a space.
    """

    def __init__(self, symbols: Iterable[str]):
        self.symbols = tuple(symbols)
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols, start=len(SPECIALS))}

    @property
    def size(self) -> int:
        return len(SPECIALS) + len(self.symbols)

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(word, UNK) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.symbols[i - len(SPECIALS)] for i in ids if i >= len(SPECIALS))

    def words(self, ids: Sequence[int]) -> list[str]:
        return [(*SPECIALS, *self.symbols)[i] for i in ids]

    def as_data(self) -> dict[str, Any]:
        return {"symbols": list(self.symbols)}


class Subwords(Vocabulary):
    """A tokenizer of the `tokenizers` library.

    Args:
        text: Its JSON.

    Raises:
        DataError: AZ708 when the library is missing.
    """

    def __init__(self, text: str):
        self.text = text

    @classmethod
    def trained(cls, lines: Iterable[str], kind: Kind, size: int, min_frequency: int = 2) -> "Subwords":
        """A tokenizer for these lines.

        Args:
            lines: What it is trained on.
            kind: `bpe`, byte-pair encoding that begins with single bytes, so nothing is unknown; or `word`, words and
                punctuation.
            size: Most ids.
            min_frequency: How often a piece must occur.

        Raises:
            DataError: AZ708 when the library is missing.
        """
        library = tokenizers()
        if kind == "bpe":
            made = library.Tokenizer(library.models.BPE())
            made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
            made.decoder = library.decoders.ByteLevel()
            trainer = library.trainers.BpeTrainer(
                vocab_size=size,
                min_frequency=min_frequency,
                special_tokens=list(SPECIALS),
                show_progress=False,
                initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            )
        else:
            made = library.Tokenizer(library.models.WordLevel(unk_token=SPECIALS[UNK]))
            made.pre_tokenizer = library.pre_tokenizers.Whitespace()
            trainer = library.trainers.WordLevelTrainer(
                vocab_size=size,
                min_frequency=min_frequency,
                special_tokens=list(SPECIALS),
                show_progress=False,
            )
        made.train_from_iterator(lines, trainer)
        return cls(made.to_str())

    @cached_property
    def tokenizer(self) -> Any:
        """The library's own object."""
        tokenizer = tokenizers().Tokenizer.from_str(self.text)
        tokenizer.encode_special_tokens = True  # `</s>` written in a text is text
        return tokenizer

    @property
    def size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i >= len(SPECIALS)])

    def words(self, ids: Sequence[int]) -> list[str]:
        return [SPECIALS[i] if i < len(SPECIALS) else self.tokenizer.decode([i]) for i in ids]

    def as_data(self) -> dict[str, Any]:
        return {"tokenizer": self.text}


def tokenizers() -> Any:
    """The library.

    Raises:
        DataError: AZ708 when it is missing.
    """
    try:
        import tokenizers as library
    except ImportError as error:
        raise DataError(
            "AZ708",
            "text is cut into tokens by the library `tokenizers`, which is not installed",
            help='pip install "attnzoo[text]"',
        ) from error
    return library

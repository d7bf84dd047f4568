"""OPUS, the open collection of parallel texts (Tiedemann, "Parallel Data, Tools and Interfaces in OPUS", 2012).

Its archives are fetched once into the folder of the data sets, beside a note of their SHA-256.
"""

import http.client
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

from attnzoo.data.parallel.corpus import Corpus
from attnzoo.data.parallel.moses import LIMIT, read_zip
from attnzoo.data.parallel.text import language_pair, unreadable
from attnzoo.errors import DataError, did_you_mean
from attnzoo.files import read_file, sha256

ADDRESS = "https://object.pouta.csc.fi/OPUS-{corpus}/{version}/moses/{pair}.txt.zip"
BOOKS = ("Books", "v1")


@dataclass(frozen=True)
class Release:
    """An archive of OPUS.

    Args:
        corpus: Such as `Books`.
        version: Such as `v1`.
        pair: Both languages in the alphabet's order, such as `en-es`.
    """

    corpus: str
    version: str
    pair: str

    @property
    def url(self) -> str:
        """Where it lies."""
        return ADDRESS.format(corpus=self.corpus, version=self.version, pair=self.pair)

    @property
    def file(self) -> str:
        """What it is called here."""
        return f"opus-{self.corpus}-{self.version}-{self.pair}.zip"

    @property
    def sha256(self) -> str | None:
        """Its checksum, where somebody published one."""
        return BOOKS_SHA256.get(self.pair) if (self.corpus, self.version) == BOOKS else None


def read_opus(name: str, root: Path, *, download: bool) -> Corpus:
    """A corpus of OPUS, from the network if need be.

    Args:
        name: `opus_books:en-es` or `opus:CORPUS/VERSION:en-es`; the first language is the source.
        root: Where data sets lie.
        download: Whether the network may be asked.

    Raises:
        DataError: AZ702 when it cannot be downloaded, AZ703 when it is not the file that was published or recorded,
            AZ712 for an impossible name or a pair that the corpus has not; what is wrong inside as for `read_zip`.
    """
    pair, release = release_of(name)
    file, record = root / release.file, root / f"{release.file}.sha256"
    if not file.exists():
        _fetch(release, name, root, download)
    found = _sha256(file)
    recorded = _recorded(record)
    if release.sha256:
        _verify(release, found, release.sha256, "published")
        note = f"the SHA-256 of {release.file} is the published one"
    elif recorded:
        _verify(release, found, recorded[0], f"recorded in {record.name} when it was first read")
        note = f"no SHA-256 of {release.file} is published; it is the one recorded when it was first read"
    else:
        note = f"no SHA-256 of {release.file} is published; {found} was recorded and is asked for from now on"
    corpus = read_zip(name, file, pair)
    if not release.sha256 and not recorded:  # only once it was found to be a corpus
        try:
            record.write_text(f"{found}  {release.file}\n", encoding="utf-8")
        except OSError as error:
            note = f"the SHA-256 of {release.file} is {found}; it could not be recorded: {error.strerror}"
    return replace(corpus, notes=(note,))


def release_of(name: str) -> tuple[tuple[str, str], Release]:
    """Source and target language, and the archive.

    Args:
        name: As for `read_opus`.

    Raises:
        DataError: AZ712 for an impossible name, or a pair that OPUS Books has not.
    """
    kind, _, rest = name.partition(":")
    which, _, languages = rest.rpartition(":")
    corpus, slash, version = "/".join(BOOKS).partition("/") if kind == "opus_books" else which.partition("/")
    word = r"[A-Za-z0-9][A-Za-z0-9._-]*"
    if (kind == "opus_books" and which) or not all(re.fullmatch(word, part) for part in (corpus, version)):
        shape = "opus_books:en-es" if kind == "opus_books" else "opus:CORPUS/VERSION:en-es"
        raise DataError(
            "AZ712", f"`{name}` is not of the form `{shape}`", help="such as `opus:Tatoeba/v2023-04-12:en-es`"
        )
    pair = language_pair(languages, name)
    release = Release(corpus, version, "-".join(sorted(pair)))
    if (corpus, version) == BOOKS and release.pair not in BOOKS_SHA256:
        ways = [way for known in BOOKS_SHA256 for way in (known, "-".join(known.split("-")[::-1]))]
        partners = sorted(way.split("-")[1] for way in ways if way.split("-")[0] == pair[0])
        known = (
            f"with {pair[0]} it has {', '.join(partners)}" if partners else f"it has no texts in {pair[0]}"
        )
        hint = did_you_mean("-".join(pair), ways)
        raise DataError("AZ712", f"OPUS Books has no pair `{'-'.join(pair)}`", why=known, help=hint)
    return pair, release


def _fetch(release: Release, name: str, root: Path, download: bool) -> None:
    """Download into a scratch folder and move into place once it is whole."""
    place = f"put {release.url} into {root} as {release.file}, or name the folder that has it in ATTNZOO_DATA"
    if not download:
        raise DataError(
            "AZ702", f"{release.file} is not in `{root}`, and downloading was not asked for", help=place
        )
    request = urllib.request.Request(release.url, headers={"User-Agent": "attnzoo"})
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".downloading-", dir=root) as scratch:
            file = Path(scratch, release.file)
            with urllib.request.urlopen(request, timeout=60) as response, file.open("wb") as out:
                size = int(response.headers.get("Content-Length") or 0)
                if size > LIMIT:
                    raise DataError("AZ714", f"{release.url} has {size:,} bytes; {LIMIT:,} are the most")
                shutil.copyfileobj(response, out)
            if size and file.stat().st_size != size:
                raise OSError(f"{file.stat().st_size:,} of {size:,} bytes came")
            if release.sha256:
                _verify(release, _sha256(file), release.sha256, "published")
            os.replace(file, root / release.file)
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise DataError("AZ702", f"cannot download {release.url}: {error}", help=place) from error
        raise DataError(
            "AZ712",
            f"`{name}` does not exist: OPUS has no pair `{release.pair}` in {release.corpus} {release.version}",
            help="https://opus.nlpl.eu lists corpora, versions and pairs; letters count as upper or lower case",
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        raise DataError("AZ702", f"cannot download {release.url}: {error}", help=place) from error


def _recorded(record: Path) -> list[str]:
    """The SHA-256 that was recorded, if any."""
    try:
        return read_file(record, most=1000).decode(errors="replace").split()[:1] if record.exists() else []
    except OSError as error:
        raise unreadable(record, error) from error


def _sha256(file: Path) -> str:
    try:
        return sha256(file, most=LIMIT)
    except OSError as error:
        raise unreadable(file, error) from error


def _verify(release: Release, found: str, wanted: str, how: str) -> None:
    if found != wanted:
        raise DataError(
            "AZ703",
            f"{release.file} has the wrong checksum",
            why=f"SHA-256 is {found}, but {wanted} was {how}",
            help=f"delete it and load again; if it happens twice and you trust {release.url} as it is now, fetch it "
            f"yourself and use `moses:FILE.zip:{release.pair}`",
        )


BOOKS_SHA256 = {
    "ca-de": "da803eb6960d41047470625695cb0f2e8676c172ccd2ed2ab285c0d666a1f80a",
    "ca-en": "77fe975b061c00f6cc9c0306d5c79bd92c91f6f2e0fc7dd3e64e785c4a73c9fa",
    "ca-hu": "a36bd2ffa5cd0a11a16581234f2d5ecde8b50825d56879e44eba861f72af417b",
    "ca-nl": "487472fb613b282c4ae4d46562a44b7e508270228ca1bf5b914593e56135b29d",
    "de-en": "556f5f2d9a954ee84bfd617e7648ed526312233d55b7bfd4d99cb3adbb5c75a3",
    "de-eo": "3dc4c23071918d8d7e7e2cd9fc7e2ab1b20ef1cf765e47de148a97fc6402873b",
    "de-es": "7f9c4bc3fc2741682d2f9686ca3440f352723544d6704332938f7ff5e4c620ec",
    "de-fr": "60dc6ed1a04639023aca60a2f3236f6e3d1befff705918f3f51c4d887a225464",
    "de-hu": "d81344f94ed63afc9f8242d74eefe6b07f82bf1256e07e159f9b4f152b5717cc",
    "de-it": "c579e12574d10e3d8755d15dfa2ce565f70f7894e9d85e17ab0e43a5f0d634e1",
    "de-nl": "97f9440f79a16cd07a037fcd883305e68abcec79f72aa0df4f9a0f82d31b1d36",
    "de-pt": "c190ec6d700c30fc3d4f61fb4002167a8332ef67b80df95e47e77229e8b1cf8a",
    "de-ru": "41b7be6f6d260ab0f15c6df20d4df580a812fa75b251056f642c713c4cbf7768",
    "el-en": "47f726870be58bf12374a70d0cc2b7c0d437961c3c81aa597d32c3ecdfd36de2",
    "el-es": "07a3af12ffc9c32ce389aae5599677d568cfb184ae607821c4206fe3ce74c968",
    "el-fr": "36e6b6ecb80a48766fadf2810472dd521221f1405da921e198636bbacf32e4e4",
    "el-hu": "6fd418791036953814899f280c2dc42fdc537f2f8e7ad6a28911bb8caf7e9e12",
    "en-eo": "5482434463ffe11e1787f5d82c39a8cdb653837a751730bce27a355be9ed15ec",
    "en-es": "81917fa2df54b0472434d9eae7d1dc54556d5d0bf6ea265ac5a9edb30e7acfc2",
    "en-fi": "bde0cf43bd9f1bc13a5d4f1ff1eb9119e621d629936660f40f83fd3db171a84b",
    "en-fr": "3b9eade0b11d6cc280502cbe52908ec476d9faa3bb589e70cf3ee1e44fcfc473",
    "en-hu": "39698aae7a802b9e45ddf39782bd9a29e7409502c2875c5b566c65b525b10ee6",
    "en-it": "0952a213f2353a3bca2dc0f2e7e8c0ce4ca3b3b62b9ae8a1e6d6d16d95a73531",
    "en-nl": "91e1551a04bdb992c9063e76d4d42f052b4dd385f84a88b2dd68be84ab86e3dd",
    "en-no": "6b1e06d342dd9b68670e5f37a8407d9295b2ec05936c48135151e63900e90a55",
    "en-pl": "d65ebb3e9114ce70f51a7449691ede3fc7afc91d7accdd40bda2e6f0b5b03e40",
    "en-pt": "66c1e44ddedb3ac10bb0478c652084b3c2c4ca3ad3c099de510578043de3e076",
    "en-ru": "c7ace000e2518da38bd92492165bfd1595fc2b3dc38a28077e52ce82973ee267",
    "en-sv": "27159d593a481295bd11cb6131c9fe8a4c6e8fbe0761318757a0c208aee363a5",
    "eo-es": "efbf8b152a40f4475f05a10f726f8b22b8d7e875e6168fe8cb91f8a9285c4894",
    "eo-fr": "2b32e3ad4e221078d57bd55ded3d1765ffc15403693c9e6f8d2ba31a2e1a0c55",
    "eo-hu": "6d4bf1fff047be0beb05d8ad04c0df1b482053f9f5d16f22ab31109b32eb46e1",
    "eo-it": "95aae3557a24ca5f5f2d738d1d167a74a4da63d972999d8ca430002cc3bf08f3",
    "eo-pt": "04d375e525b50b9ced8328d365bc5cb47537f8283c3edeba1ec0ea88e1fe35b5",
    "es-fi": "cd08f8ef9e3d8aaf16c3501b5c87c4e0890114e3e19994b8686f5f6e2fcbed41",
    "es-fr": "51c3c98290a35043e85b4be83f7f0c7c0800872b1dbffcb314869dac49da8eb1",
    "es-it": "fbd2f3ccbf37c72acc88f4409524764ca18a1cba4b2db0876d8dae568b47d9b3",
    "es-nl": "ace44d8366b7cc07bc259341b834b48c99c87e73dc96bc1f06351bc9724025ff",
    "es-no": "4ff2f53a01dfa6f93f9c7ef7038c75f026344520c0c3e5b87b1a4e481d84c05a",
    "es-pt": "e27098934c7df2e0c08b02a990372ee08b91f910efca06fa44957f67e1b4fbe5",
    "es-ru": "e0ae4efce66a16dcf784af4dcac1a87b773101cec3234502bb040e22d2f29859",
    "fi-fr": "dfe53b1c0118c41e26c5c66e9122f4db0bc201518e18fa7494c2089ec7120e48",
    "fi-no": "3c260b62bb374d91ed78ac2a9b6403fe38c5316894de27f6f84280520da06d7b",
    "fi-pl": "f06f57294b7d9b52380f60936c052070d083ca9e6cb18407c82ce380245f2d4b",
    "fr-hu": "85a13ab952f4086f0227548a25e4502ffa834ead9beca2c03719bd56bea6ff45",
    "fr-it": "960f69294110f9ea508b84d8e3c3b84e32fb37af0df11379277adceee5881886",
    "fr-nl": "3e167588d7213107f2e4396087dae3baad93719d246e9dda40116922107a4fac",
    "fr-no": "74e55cf61c749507e9d60eb54b01859bc92dff6bf90abb2a23e0e6d26b77234b",
    "fr-pl": "a5bae822e60cf8fa60ed39f4b6cb317c086710b33b64e6e4de02f08a93166816",
    "fr-pt": "b0d81ef16d434ab48e974bcd689fbbd51e7db14909e6c2ef8364b218e7a291f4",
    "fr-ru": "90e9ad0b96790fd29b0bb7c20036d22d476092c6d24579c005d86308cc3b9b00",
    "fr-sv": "2a9d6fcff3eecbe54c4addb0455cf0a5a1c19a083a9ee413fb543f2167b30694",
    "hu-it": "f951546033a0f1f195b96b207943abc12d6551c4ae16c49ea200a6e4299ce8cf",
    "hu-nl": "fb6b4de552aa9621aaf14694dbd71a225b20e00dfa3100aa416d7bc3187e0db6",
    "hu-no": "565823d21b1d8b4e7e584d8ca450ac1b056296f4e4d13c6afd713204cc4b19ee",
    "hu-pl": "7c13fd2b6e939f2de1a0034e666de5ec1c816539e677c2a4a225033da3baaad0",
    "hu-pt": "ff9f60b6648c3173ec560bc896c8a5e6b88689f2cf30139f7decead0527c00dc",
    "hu-ru": "7a6ad2df2ef3b72b4738546537990f2129a2f4660ce3072ce8f5c70699012156",
    "it-nl": "956683fca4053e31191768e18ecaa3e9539b065a990151c9c2b8817e477ce9e6",
    "it-pt": "6261f21b3b0267a3cd6f606a03c9628067f9b2ec4a7a12c0da6baf1a579569cd",
    "it-ru": "2d6dbfa1f8c68d230f6b1e373bbb08809e73a36d4a8d9543412e59221a6fafe2",
    "it-sv": "86d12b740456c3ff8a6cbf15f6b445b23402f4b2c684bd3d67b0f058329dde5b",
}
"""Of all archives of OPUS Books v1, as the Hugging Face library `datasets` recorded them, up to version 2.5."""

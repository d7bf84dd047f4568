"""What a saved model, or a run, remembers of the plugins and versions that it was made with, and of them alone."""

import hashlib
import json
import platform
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Annotated, Any, cast
from urllib.parse import urlsplit

import timm
import torch
from pydantic import BaseModel, Field, ValidationError

from attnzoo.core import Fusion
from attnzoo.errors import RecipeError, VersionWarning
from attnzoo.files import sha256
from attnzoo.zoo import Entry, Provider, load_zoo
from attnzoo.zoo.blame import OURS

INDEX, EDITABLE, PATH = "index", "editable", "path"
"""Where a distribution came from: an index such as PyPI, a folder that is edited, a file or folder; else an address."""
_WORDS = {
    EDITABLE: "a folder that is edited (pip install -e)",
    PATH: "a file or folder",
    "": "no distribution",
}
# These become part of a command that somebody may copy, so they hold nothing that a shell would read.
_Name = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?$", max_length=200)]
_Version = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9.!+_-]*)?$", max_length=100)]
_Origin = Annotated[str, Field(pattern=r"^[A-Za-z0-9.~:/@%+_-]*$", max_length=500)]
_Digest = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]


class Plugin(BaseModel):
    """A plugin that something was made with.

    Args:
        distribution: What pip calls it; empty where it was none.
        version: Of the distribution.
        origin: `index`, `editable`, `path`, or an address; empty where it is not known.
        sha256: Of its source, in hexadecimal.
        offers: Names of its components that were used, by kind: `mechanism`, `fusion`.
    """

    distribution: _Name = ""
    version: _Version = ""
    origin: _Origin = ""
    sha256: _Digest = ""
    offers: dict[str, list[str]] = {}

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".strip() or "a plugin without a distribution"

    @property
    def how_to_get(self) -> str:
        """The next step of somebody who lacks it. No index is named for what did not come from one."""
        if self.origin == INDEX and self.distribution and "+" not in self.version:
            return f"`pip install {self.distribution}{f'=={self.version}' if self.version else ''}`"
        source = _WORDS.get(self.origin, self.origin) if self.origin != INDEX else "a build of its own"
        stranger = f"; a `{self.distribution}` on an index may be a stranger's" if self.distribution else ""
        return f"ask for it where this was made: it was installed from {source}, not from an index{stranger}"


class MadeWith(BaseModel):
    """The versions that something was made with.

    Args:
        attnzoo: Version of attnzoo.
        torch: Version of PyTorch.
        timm: Version of timm.
        python: Version of Python.
        plugins: The plugins whose components are used, by name.
    """

    attnzoo: _Version
    torch: _Version
    timm: _Version
    python: _Version
    plugins: dict[str, Plugin] = {}

    def owner(self, kind: str, name: str) -> str:
        """The plugin that a bare name meant; empty for a name that was none of a plugin.

        Args:
            kind: `mechanism` or `fusion`.
            name: As the recipe has it.
        """
        return next(
            (plugin for plugin, made in self.plugins.items() if name in made.offers.get(kind, ())), ""
        )

    def others(self) -> list[tuple[str, Plugin, Provider]]:
        """The plugins that are here in another version, or from another distribution: name, then, now."""
        return [
            (name, made, here)
            for name, made in self.plugins.items()
            if (here := provider_of(name)) is not None and not _same(made, here)
        ]


def made_with(entries: Iterable[Entry]) -> MadeWith:
    """The versions of here, and the plugins of some components.

    Args:
        entries: The components.
    """
    own: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.plugin != OURS:
            own.setdefault(entry.plugin, []).append(entry)
    ours = provider_of(OURS)
    return MadeWith(
        attnzoo=ours.version if ours else "",
        torch=str(torch.__version__),
        timm=timm.__version__,
        python=platform.python_version(),
        plugins={name: _plugin(name, own[name]) for name in sorted(own)},
    )


def read_made_with(data: Any) -> MadeWith:
    """The record in a saved configuration, which anybody may have written.

    Args:
        data: What it says.

    Raises:
        RecipeError: AZ831.
    """
    try:
        return MadeWith.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise RecipeError(
            "AZ831",
            "`made_with` is no record of versions",
            why=f"{f'`{where[:100]}`: ' if where else ''}{first['msg']}",
            help="leave `made_with` out of the configuration; the model is built without it as well",
        ) from None


def warn_of_others(made: MadeWith | None, stacklevel: int = 3) -> None:
    """Say in one line which plugins are here in another version than something was made with.

    Args:
        made: What it was made with, if that is known.
        stacklevel: Whose line is named: 3 for who called our caller.
    """
    for name, then, here in made.others() if made else ():
        text = f"made with {then}, here is {here.dist} {here.version} (plugin `{name}`)"
        warnings.warn(text, VersionWarning, stacklevel=stacklevel)


def provider_of(plugin: str) -> Provider | None:
    """The plugin of that name that is here, a working one first; None when there is none.

    Args:
        plugin: Its name.
    """
    found = [provider for provider in load_zoo().providers if provider.name == plugin]
    return next((provider for provider in found if provider.works), next(iter(found), None))


def source_sha256(entry: Entry) -> str:
    """SHA-256 of the source that a component is made of; empty where there is no file.

    Of a plugin that is its whole package, since a component's file takes from others; of a built-in its own file.

    Args:
        entry: The component.
    """
    words = entry.value.__module__.split(".")
    if entry.plugin == OURS:
        return sha256(entry.file) if entry.file else ""
    for count in range(1, len(words) + 1):  # a namespace has no file of its own: others lie in it as well
        file = getattr(sys.modules.get(".".join(words[:count])), "__file__", None)
        if file is not None:
            return _source(Path(file))
    return ""


def _source(file: Path) -> str:
    """Of a module, or of all that lies in a package beside its `__init__`, but for what Python makes itself."""
    if file.name != "__init__.py":
        return sha256(file) if file.is_file() else ""
    files = {
        path.relative_to(file.parent).as_posix(): path
        for path in file.parent.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    lines = [f"{name} {sha256(files[name])}\n" for name in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _plugin(name: str, entries: list[Entry]) -> Plugin:
    provider = provider_of(name)
    offers: dict[str, list[str]] = {}
    for entry in entries:
        offers.setdefault("fusion" if issubclass(entry.value, Fusion) else "mechanism", []).append(entry.name)
    try:
        return Plugin(
            distribution=provider.dist if provider else "",
            version=entries[0].version,
            origin=_origin(provider.dist) if provider and provider.dist else "",
            sha256=source_sha256(entries[0]),
            offers={kind: sorted(names) for kind, names in offers.items()},
        )
    except (ValidationError, OSError):  # names that pip would not take, or sources that are gone
        return Plugin(offers=offers)


def _origin(dist: str) -> str:
    """Where a distribution came from, by PEP 610; without a path of this machine, a name or a password."""
    try:
        said = cast(Distribution, distribution(dist)).read_text("direct_url.json")
        direct = json.loads(said) if said else None
    except Exception:  # whatever broken metadata makes importlib raise
        return ""
    if direct is None:
        return INDEX
    url = urlsplit(str(direct.get("url", "")))
    if url.scheme in ("file", ""):
        return EDITABLE if direct.get("dir_info", {}).get("editable") else PATH
    vcs: Mapping[str, Any] = direct.get("vcs_info", {})
    address = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
    return f"{vcs['vcs']}+{address}@{vcs.get('commit_id', '')}" if vcs.get("vcs") else address


def _same(made: Plugin, here: Provider) -> bool:
    return (_canonical(made.distribution), made.version) == (_canonical(here.dist), here.version)


def _canonical(name: str) -> str:
    """A distribution's name as indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()

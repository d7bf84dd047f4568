"""The built-in plugin: every component, probe and intervention in this package, every recipe shipped with it."""

import importlib
import os
from pathlib import Path

from attnzoo.zoo.blame import OURS, place_in
from attnzoo.zoo.contract import FUSION, INTERVENTION, MECHANISM, PROBE, Kind, Unimportable, concrete
from attnzoo.zoo.hookspecs import hookimpl
from attnzoo.zoo.shipped import PACKAGE, recipes_folder


def _offered(package: str, kind: Kind) -> list[type | Unimportable]:
    """The components defined in a package, file by file: one that is broken takes no other with it."""
    found: list[type | Unimportable] = []
    for file in sorted((PACKAGE / package).rglob("*.py")):
        if file.stem == "__init__":
            continue
        name = ".".join(("attnzoo", *file.relative_to(PACKAGE).with_suffix("").parts))
        try:
            module = importlib.import_module(name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            found.append(Unimportable(file.stem, _where(file, error), error))
            continue
        found += [v for v in vars(module).values() if concrete(v, kind.bases) and v.__module__ == name]
    return found


def _where(file: Path, error: BaseException) -> str:
    """The line at fault, in this file or in one that it imports; without a line when Python names none."""
    place = place_in(error, OURS)
    if place is None or place.file == __file__:
        return str(file.relative_to(PACKAGE.parent))
    return f"{os.path.relpath(place.file, PACKAGE.parent)}:{place.line}"


@hookimpl
def attnzoo_mechanisms():
    """All mechanisms and heads of `attnzoo.mechanisms`."""
    return _offered("mechanisms", MECHANISM)


@hookimpl
def attnzoo_fusions():
    """All fusions of `attnzoo.fusions`."""
    return _offered("fusions", FUSION)


@hookimpl
def attnzoo_probes():
    """All probes of `attnzoo.probes`."""
    return _offered("probes", PROBE)


@hookimpl
def attnzoo_interventions():
    """All interventions of `attnzoo.interventions`."""
    return _offered("interventions", INTERVENTION)


@hookimpl
def attnzoo_recipes():
    """The shipped recipes."""
    folder = recipes_folder()
    return [folder, folder / "digits", folder / "dual", folder / "pyramid"]

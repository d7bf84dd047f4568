"""What a shell completes: names of the zoo, files of recipes, runs.

Mechanisms are Python classes, so their names are known only once torch and every plugin are imported, which takes
seconds. They are therefore kept in a file, with a key that changes when a distribution with plugins is installed,
removed or edited; a process of its own writes it, whose output nobody sees, so that no plugin can disturb a shell.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from attnzoo.version import VERSION

PATIENCE = 20.0
"""Seconds that plugins have for their import; after that only what is built in is completed."""
_SURVEY = "import sys; from attnzoo.cli.completion import write_names; write_names(sys.argv[1])"
_HARMLESS = re.compile(r"[\w./+@%,~-]+")


def components(incomplete: str) -> list[str]:
    """Mechanisms and fusions."""
    return _starting([*_names("mechanism"), *_names("fusion")], incomplete)


def shown(incomplete: str) -> list[str]:
    """What has a page in a gallery: mechanisms, fusions, probes and interventions."""
    return components(incomplete) + probes(incomplete) + interventions(incomplete)


def everything(incomplete: str) -> list[str]:
    """Mechanisms, fusions and recipes."""
    names = [*_names("probe"), *_names("intervention"), *_names("recipe")]
    return components(incomplete) + _starting(names, incomplete)


def probes(incomplete: str) -> list[str]:
    """Names of probes."""
    return _starting(_names("probe"), incomplete)


def interventions(incomplete: str) -> list[str]:
    """Names of interventions."""
    return _starting(_names("intervention"), incomplete)


def plugins(incomplete: str) -> list[str]:
    """Plugins and their distributions."""
    return _starting(_names("plugin"), incomplete)


def checkable(incomplete: str) -> list[str]:
    """Mechanisms, fusions, and Python files once something is typed."""
    return _with_paths(components(incomplete), incomplete, _is_script)


def recipes(incomplete: str) -> list[str]:
    """Recipes, and YAML files once something is typed."""
    return _with_paths(_starting(_names("recipe"), incomplete), incomplete, _is_recipe)


def benchmarks(incomplete: str) -> list[str]:
    """The benchmarks that have a name, and recipes."""
    return _starting(["augment", "decode", "mechanisms", "rivals", "train"], incomplete) + recipes(incomplete)


def runs(incomplete: str) -> list[str]:
    """Folders of runs; those in `runs/` when nothing is typed yet."""
    return _with_paths([], incomplete or "runs/", _is_run)


def runs_and_recipes(incomplete: str) -> list[str]:
    """What can be looked into: runs, and recipes."""
    names = _starting(_names("recipe"), incomplete)
    return _with_paths(names, incomplete or "runs/", lambda path: _is_run(path) or _is_recipe(path))


def scripts(incomplete: str) -> list[str]:
    """Python files."""
    return _with_paths([], incomplete or "./", _is_script)


def _is_run(path: Path) -> bool:
    return next(path.glob("step_*"), None) is not None


def _is_recipe(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml")


def _is_script(path: Path) -> bool:
    return path.suffix == ".py"


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete) and _HARMLESS.fullmatch(name)]


def _with_paths(names: list[str], incomplete: str, fits: Callable[[Path], bool]) -> list[str]:
    """Names and paths; a folder that is the only answer is entered, since a shell would go on behind it."""
    found = names + (_paths(incomplete, fits) if incomplete else [])
    while len(found) == 1 and found[0].endswith("/") and (inside := _paths(found[0], fits)):
        found = inside
    return found


def _paths(incomplete: str, fits: Callable[[Path], bool]) -> list[str]:
    """Paths that fit, and folders in which others may lie."""
    start = incomplete[: incomplete.rfind("/") + 1]
    last = incomplete[len(start) :]
    found = []
    with suppress(OSError, RuntimeError):  # no such folder, no such user
        for path in sorted(Path(start or ".").expanduser().iterdir()):
            shown = not path.name.startswith(".") or last.startswith(".")
            if shown and path.name.startswith(last):
                if fits(path):
                    found.append(start + path.name)
                elif path.is_dir():
                    found.append(f"{start}{path.name}/")
    return _starting(found, incomplete)


def _names(kind: str) -> list[str]:
    """The names of a kind, from the file if it is fresh."""
    key = _key()
    with suppress(OSError, RuntimeError, ValueError, KeyError, TypeError):
        kept = json.loads(_place().read_text(encoding="utf-8"))
        if kept["key"] == key:
            return kept[kind]
    names = _survey({}) or _survey({"ATTNZOO_PLUGINS": ""})
    with suppress(OSError, RuntimeError):  # where nothing can be kept, the next time takes as long
        place = _place()
        place.parent.mkdir(parents=True, exist_ok=True)
        written = place.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps({"key": key} | names), encoding="utf-8")
        written.replace(place)
    return names.get(kind, [])


def _survey(switches: dict[str, str]) -> dict[str, list[str]]:
    """The names as a process of its own finds them; empty when a plugin ends or delays it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | switches
    environment.pop("_ATTNZOO_COMPLETE", None)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "names.json"
        command = [sys.executable, "-P", "-c", _SURVEY, str(target)]
        with suppress(OSError, ValueError, subprocess.TimeoutExpired):
            subprocess.run(
                command,
                env=environment,
                timeout=PATIENCE,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            return json.loads(target.read_text(encoding="utf-8"))
    return {}


def write_names(target: str) -> None:
    """Write the names of this environment's zoo.

    Args:
        target: A JSON file: names by kind.
    """
    from attnzoo.zoo import load_zoo

    zoo = load_zoo()
    names = {registry.kind: list(registry) for registry in zoo.registries}
    names["plugin"] = sorted(
        {name for provider in zoo.providers for name in (provider.name, provider.dist)} - {""}
    )
    Path(target).write_text(json.dumps(names), encoding="utf-8")


def _place() -> Path:
    """The file: one for each environment of Python."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "attnzoo" / f"names-{hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]}.json"


def _key() -> str:
    """Changes with the installed plugins, with their files, and with what switches them off."""
    from attnzoo.zoo.hookspecs import PROJECT
    from attnzoo.zoo.shipped import recipes_folder

    parts = [
        VERSION,
        *(os.environ.get(f"ATTNZOO_{name}", "-") for name in ("PLUGINS", "DISABLE_PLUGINS")),
    ]
    places = {Path(__file__).parent.parent, recipes_folder()}
    for point in sorted(entry_points(group=PROJECT)):
        parts += [point.name, point.value]
        with suppress(Exception):  # whatever broken metadata makes importlib raise
            parts.append(str(point.dist and point.dist.version))
        places |= _places(re.split(r"[.:]", point.value)[0].strip())
    parts += [stamp for place in sorted(places) for stamp in _stamps(place)]
    return hashlib.sha256("\n".join(parts).encode(errors="replace")).hexdigest()


def _places(package: str) -> set[Path]:
    """Where a package lies, found without importing it."""
    spec = None
    with suppress(ImportError, ValueError):
        spec = find_spec(package)
    if spec is None:
        return set()
    return {Path(place) for place in spec.submodule_search_locations or filter(None, [spec.origin])}


def _stamps(place: Path) -> Iterator[str]:
    """Names and times of change of the modules and recipes in a folder, or of one file."""
    files = [Path(root, name) for root, _, names in os.walk(place) for name in names] or [place]
    for file in sorted(file for file in files if file.suffix in (".py", ".yaml")):
        with suppress(OSError):
            yield f"{file} {file.stat().st_mtime_ns}"

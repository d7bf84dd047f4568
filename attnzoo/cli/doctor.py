"""`attnzoo doctor`: is everything in order here?"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from attnzoo.cli.list import AsJson
from attnzoo.cli.plugins import say_problems

CORE = (
    "torch",
    "torchvision",
    "timm",
    "pluggy",
    "pydantic",
    "pyyaml",
    "typer",
    "rich",
    "hypothesis",
    "jaxtyping",
    "safetensors",
    "pillow",
)
EXTRAS = {"onnx": ("onnx", "onnxscript", "onnxruntime")}


def doctor(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the tracebacks of broken plugins.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look at versions, devices, extras and plugins. Ends with 3 when a plugin is broken, 2 when something else is."""
    from attnzoo.cli.render import Column, facts, say, say_json, say_next, seconds, table

    ills, problems = _torch_pair(), list[Any]()
    data: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in CORE},
        "extras": {},
        "ills": ills,
    }
    for extra, names in EXTRAS.items():
        missing = [name for name in names if not _version(name)]
        data["extras"][extra] = (
            f'missing {", ".join(missing)}: pip install "attnzoo[{extra}]"' if missing else "there"
        )
    if not ills:
        import torch

        from attnzoo.recipe import timm_models  # registers, and thereby reads every recipe
        from attnzoo.zoo import load_zoo

        zoo = load_zoo()
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        data["devices"] = {"cpu threads": torch.get_num_threads(), "gpu": gpu or "none"}
        data["switches"] = {
            name: os.environ[name]
            for name in ("ATTNZOO_PLUGINS", "ATTNZOO_DISABLE_PLUGINS")
            if name in os.environ
        }
        data["plugins"] = [vars(provider) for provider in zoo.providers]
        data["models"] = len(timm_models.registered)
        problems = zoo.problems
        data["problems"] = [vars(problem) for problem in problems]
    broken = any(problem.fatal for problem in problems)
    if as_json:
        say_json(data)
    else:
        facts([("python", data["python"])] + [(n, v or "missing") for n, v in data["versions"].items()])
        for extra, state in data["extras"].items():
            say(f"extra {extra}: {state}")
        for name, value in (data.get("devices", {}) | data.get("switches", {})).items():
            say(f"{name}: {value}")
        say()
        table(
            [
                Column("plugin"),
                Column("distribution", rank=3),
                Column("version", rank=2),
                Column("status"),
                Column("import", rank=1, right=True),
            ],
            [
                [p["name"], p["dist"], p["version"], p["status"], seconds(p["seconds"])]
                for p in data.get("plugins", [])
            ],
        )
        for ill in ills:
            say(f"ill: {ill}", style="red")
        say_problems(problems, verbose)
        if not ills and not problems:
            say("all is well", style="green")
        say_next("attnzoo doctor --verbose" if broken and not verbose else "attnzoo list")
    if ills or broken:
        raise typer.Exit(3 if broken else 2)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _torch_pair() -> list[str]:
    """Whether torch and torchvision are a pair, which is what most broken installations lack."""
    try:
        import timm  # noqa: F401
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, AttributeError) as error:
        first = str(error).splitlines()[0]
        pair = "torch==2.14.1 torchvision==0.29.1"
        if "torchvision::nms" in str(error) or "torchvision" in str(error):
            return [
                f"torch {_version('torch')} and torchvision {_version('torchvision')} are no pair ({first}); "
                f"install both together: pip install {pair}"
            ]
        return [f"timm does not import: {first}"]
    return []

"""`attnzoo check`: the conformance suite."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from attnzoo.cli.list import AsJson


def check(
    names: Annotated[
        list[str] | None, typer.Argument(help="Mechanisms, fusions, or Python files that hold some.")
    ] = None,
    plugin: Annotated[
        str | None, typer.Option(help="All that this plugin (or distribution) provides.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that there is.")] = False,
    examples: Annotated[int, typer.Option(min=1, max=100_000, help="Examples for each property.")] = 25,
    as_json: AsJson = False,
) -> None:
    """Hold mechanisms and fusions to their cards. Ends with 1 when a claim fails."""
    from attnzoo.cli.render import console, say, say_json, say_next, table

    classes = _classes(names or [], plugin, everything)
    from hypothesis.configuration import set_hypothesis_home_dir

    from attnzoo.testing import check as run_checks

    set_hypothesis_home_dir(
        Path(tempfile.gettempdir()) / "attnzoo-check"
    )  # nothing is left where the user works

    results = []
    for cls in classes:
        if not as_json and console().is_terminal:
            say(f"checking {cls.card.name} ...", style="dim")
        results += run_checks(cls, examples=examples)
    failed = [r for r in results if r.status in ("failed", "unexpected pass")]
    if as_json:
        say_json([vars(r) for r in results])
    else:
        rows = []
        for cls in classes:
            own = [r for r in results if r.mechanism == cls.card.name]
            bad = [r.check for r in own if r in failed]
            rows.append(
                [cls.card.name, str(sum(r.status == "passed" for r in own)), str(len(bad)), ", ".join(bad)]
            )
        table(["name", "passed", "failed", "which"], rows, right=["passed", "failed"])
        for result in failed:
            say(f"{result.mechanism}: {result.check}", style="bold red")
            say(f"{result.reason}")
            if result.reproduction:
                say(f"{result.reproduction}\n", style="dim")
        skipped = [r for r in results if r.status == "skipped"]
        for result in skipped:
            say(f"{result.mechanism}: {result.check} says nothing: {result.reason}", style="dim")
        hold = len(results) - len(failed) - len(skipped)
        say(f"{hold} of {len(results)} checks hold, {examples} examples each")
        if failed:
            say_next(f"mend the component or its card, then attnzoo check {failed[0].mechanism}")
        else:
            say_next(f"attnzoo show {classes[0].card.name}", "attnzoo compose RECIPE")
    if failed:
        raise typer.Exit(1)


def _classes(names: list[str], plugin: str | None, everything: bool) -> list[Any]:
    from attnzoo.errors import CheckError, RecipeError, did_you_mean
    from attnzoo.zoo import load_zoo

    zoo = load_zoo()
    offers = [*zoo.mechanisms.values(), *zoo.fusions.values()]
    if everything:
        return [entry.value for entry in offers]
    classes: list[Any] = []
    if plugin:
        found = [p.name for p in zoo.providers if plugin in (p.name, p.dist)]
        classes = [entry.value for entry in offers if entry.plugin in found]
        if not classes:
            known = [p.name for p in zoo.providers] + [p.dist for p in zoo.providers]
            problem = next((p for p in zoo.problems if p.plugin in found), None)
            why = f"{problem.code}: {problem.reason}" if problem else ""
            hint = did_you_mean(plugin, known) or "`attnzoo plugins` shows what is installed"
            raise CheckError("AZ502", f"`{plugin}` provides nothing that can be checked", why=why, help=hint)
    for name in names:
        if name.endswith(".py"):
            from attnzoo.testing.runner import load_file

            classes += load_file(Path(name))
        elif name in zoo.mechanisms or name in zoo.mechanisms.conflicts:
            classes.append(zoo.mechanisms.find(name).value)
        elif name in zoo.fusions or name in zoo.fusions.conflicts:
            classes.append(zoo.fusions.find(name).value)
        else:
            hint = did_you_mean(name, [*zoo.mechanisms, *zoo.fusions])
            raise RecipeError("AZ201", f"there is no mechanism or fusion called `{name}`",
                              help=f"{hint} `attnzoo list` shows all".strip())  # fmt: skip
    if not classes:
        raise CheckError(
            "AZ502", "nothing to check", help="name a mechanism or a file, or say --plugin NAME or --all"
        )
    return classes

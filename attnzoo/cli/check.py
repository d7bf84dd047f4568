"""`attnzoo check`: the conformance suite."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from attnzoo.cli import completion
from attnzoo.cli.list import AsJson


def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Mechanisms, fusions, or Python files that hold some.", autocompletion=completion.checkable
        ),
    ] = None,
    plugin: Annotated[
        str | None,
        typer.Option(
            help="All that this plugin (or distribution) provides.", autocompletion=completion.plugins
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that there is.")] = False,
    examples: Annotated[int, typer.Option(min=1, max=100_000, help="Examples for each property.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Hold mechanisms and fusions to their cards. Ends with 1 when a claim fails."""
    from attnzoo.cli.render import Column, console, say, say_json, say_next, table

    classes = _classes(names or [], plugin, everything)
    from hypothesis.configuration import set_hypothesis_home_dir

    from attnzoo.testing import check as run_checks

    # nothing is left where the user works
    set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "attnzoo-check")

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
        table(
            [
                Column("name"),
                Column("passed", rank=1, right=True),
                Column("failed", right=True),
                Column("which", wrap=24),
            ],
            rows,
        )
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
    from attnzoo.zoo import Entry, load_zoo

    zoo = load_zoo()
    offers: list[Entry[Any]] = [*zoo.mechanisms.values(), *zoo.fusions.values()]
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

            classes += [_with_card(cls) for cls in load_file(Path(name))]
        elif zoo.mechanisms.knows(name):
            classes.append(zoo.mechanisms.find(name).value)
        elif zoo.fusions.knows(name):
            classes.append(zoo.fusions.find(name).value)
        else:
            hint = did_you_mean(name, [*zoo.mechanisms, *zoo.fusions])
            raise RecipeError(
                "AZ201",
                f"there is no mechanism or fusion called `{name}`",
                help=f"{hint} `attnzoo list` shows all".strip(),
            )
    if not classes:
        raise CheckError(
            "AZ502", "nothing to check", help="name a mechanism or a file, or say --plugin NAME or --all"
        )
    return classes


def _with_card(cls: Any) -> Any:
    """A class of a file, once it is certain that it has a card that can be read."""
    from attnzoo.errors import CheckError
    from attnzoo.zoo.contract import Breach, card_of

    try:
        card_of(cls)
    except Breach as error:
        text = f"`{cls.__name__}` {error.reason}"
        raise CheckError("AZ502", text, help="the class needs a `card` before it can be held to it") from None
    return cls

"""`attnzoo gallery --out DIR`: pages of all that is installed, as HTML."""

from pathlib import Path
from typing import Annotated

import typer

from attnzoo.cli import completion
from attnzoo.cli.list import AsJson


def gallery(
    out: Annotated[Path, typer.Option(help="A new folder, or a gallery that is brought up to date.")],
    only: Annotated[
        list[str],
        typer.Option(help="Only this component; again for more.", autocompletion=completion.shown),
    ] = [],  # noqa: B006
    plugin: Annotated[
        str | None, typer.Option(help="Only what this plugin provides.", autocompletion=completion.plugins)
    ] = None,
    pictures: Annotated[
        bool, typer.Option(help="Draw and check the components, which takes seconds for each.")
    ] = True,
    timings: Annotated[
        Path | None,
        typer.Option(help="The CSV of `attnzoo bench mechanisms`, for times as tokens grow."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="How many processes draw.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Build a page for each mechanism, pool, fusion, probe and intervention, and an overview that filters them."""
    from attnzoo.cli.render import say, say_json, say_next, spaced, warn
    from attnzoo.gallery import build

    built = build(
        out,
        only=only,
        plugin=plugin,
        pictures=pictures,
        timings=timings,
        workers=workers,
        report=warn,
    )
    written = built.written
    for line in built.warnings:
        warn(line)
    if as_json:
        data = {
            "index": built.index,
            "bytes": built.size,
            "pages": written.pages,
            "left_out": written.left_out,
        }
        say_json(data | {"warnings": built.warnings})
        return
    say(f"{spaced(len(written.pages))} pages, {built.size / 1e6:.1f} MB: {built.index}")
    if written.left_out:
        say(
            f"{len(written.left_out)} of them lack a picture or a check: their pages, and --json, say why",
            "dim",
        )
    say_next(f"open {built.index} in a browser")

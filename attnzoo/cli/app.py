"""The command line put together. `--help` and usage errors import neither torch nor timm."""

import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from typer.core import TyperCommand, TyperGroup

from attnzoo.cli import (
    bench,
    check,
    compare,
    compose,
    cost,
    diff,
    doctor,
    eval,
    explain,
    gallery,
    graft,
    heatmap,
    list,
    new,
    output,
    plugins,
    probe,
    repro,
    resume,
    run,
    schema,
    show,
    sweep,
    train,
    translate,
)
from attnzoo.errors import VersionWarning, ZooError
from attnzoo.version import VERSION

PROGRAM = "program"
"""Marks that the program itself runs, and not somebody who calls a verb."""


class Verb(TyperCommand):
    """A verb that asks plugins: they cannot write to standard output, and what they raise is their fault."""

    def invoke(self, ctx):
        if ctx.obj is PROGRAM:
            output.reserve()
        try:
            with _drawn_warnings():
                answer = super().invoke(ctx)
        except BaseException as error:  # SystemExit too: a plugin may not end the program
            fault = _fault(error)
            if fault is None:
                raise
            raise fault from error
        output.stdout().flush()
        return answer


@contextmanager
def _drawn_warnings() -> Iterator[None]:
    """Warnings about versions of plugins as a line on stderr, without a line of code, each once."""
    with warnings.catch_warnings():
        others, told = warnings.showwarning, set[str]()

        def show(message, category, *where, **more):
            if not issubclass(category, VersionWarning):
                others(message, category, *where, **more)
            elif str(message) not in told:
                from attnzoo.cli.render import warn

                told.add(str(message))
                warn(f"warning: {message}")

        warnings.showwarning = show
        yield


def _fault(error: BaseException) -> ZooError | None:
    """A plugin's fault in words; None for what is no plugin's."""
    manager = sys.modules.get("attnzoo.zoo.manager")
    if manager is None or isinstance(error, ZooError):  # no plugin was asked, or all is said
        return None
    from attnzoo.zoo.blame import blame

    found = blame(error, manager.loaded_components())
    return found.as_error() if found else None


class Verbs(TyperGroup):
    """All verbs: faults of the input are drawn, not traced; 0 ok, 1 a check failed, 2 user error, 3 plugin error."""

    def parse_args(self, ctx, args):
        self.as_json = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except ZooError as error:
            from attnzoo.cli.render import show_error

            try:
                show_error(error, as_json=self.as_json)
                output.stdout().flush()
            except output.Unwritable as other:
                show_error(other)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Verbs,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A zoo of attention mechanisms that compose into timm backbones.",
    epilog="First steps: attnzoo list · attnzoo compose ham_a · attnzoo new plugin mine",
)
app.add_typer(new.app, name="new")
VERBS: dict[str, Callable[..., None]] = {
    "list": list.list_,
    "show": show.show,
    "compose": compose.compose,
    "check": check.check,
    "plugins": plugins.plugins,
    "doctor": doctor.doctor,
    "schema": schema.schema,
    "bench": bench.bench,
    "heatmap": heatmap.heatmap,
    "graft": graft.graft,
    "ungraft": graft.ungraft,
    "train": train.train,
    "compare": compare.compare,
    "sweep": sweep.sweep,
    "cost": cost.cost,
    "diff": diff.diff,
    "explain": explain.explain,
    "resume": resume.resume,
    "repro": repro.repro,
    "eval": eval.eval_,
    "translate": translate.translate,
    "probe": probe.probe,
    "gallery": gallery.gallery,
}
for name, verb in VERBS.items():
    app.command(name, cls=Verb)(verb)
app.command("run", context_settings=run.CONTEXT)(run.run)

FIRST_STEPS = [
    ("attnzoo list", "what there is"),
    ("attnzoo show softmax", "one of them: equations, options, masks, paper"),
    (
        "attnzoo compose ham_a",
        "a recipe as a model: what is put where, what it costs, one forward and backward",
    ),
    ("attnzoo check softmax", "the conformance suite"),
    ("attnzoo new plugin mine", "your own mechanism, in one file"),
    ("attnzoo --help", "all verbs"),
]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """A zoo of attention mechanisms that compose into timm backbones."""
    if version:
        typer.echo(f"attnzoo {VERSION}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        from attnzoo.cli.render import facts, say

        say("attnzoo: a zoo of attention mechanisms that compose into timm backbones.\n")
        facts(FIRST_STEPS, indent=2)


def main() -> None:
    """Run a verb and end the program with its exit code."""
    try:
        app(prog_name="attnzoo", obj=PROGRAM)
    finally:
        output.close()
        gc.freeze()  # or the end of the process looks for cycles in all that was imported, for more than a second

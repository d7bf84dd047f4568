"""The command line put together. `--help` and usage errors import neither torch nor timm."""

from typing import Annotated

import typer
from typer.core import TyperGroup

import attnzoo
from attnzoo.cli import (
    bench,
    check,
    compare,
    compose,
    doctor,
    eval,
    heatmap,
    list,
    new,
    plugins,
    resume,
    run,
    schema,
    show,
    train,
    translate,
)
from attnzoo.errors import ZooError


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

            show_error(error, as_json=self.as_json)
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
app.command("list")(list.list_)
app.command("show")(show.show)
app.command("compose")(compose.compose)
app.command("check")(check.check)
app.add_typer(new.app, name="new")
app.command("plugins")(plugins.plugins)
app.command("doctor")(doctor.doctor)
app.command("schema")(schema.schema)
app.command("bench")(bench.bench)
app.command("heatmap")(heatmap.heatmap)
app.command("train")(train.train)
app.command("compare")(compare.compare)
app.command("resume")(resume.resume)
app.command("eval")(eval.eval_)
app.command("translate")(translate.translate)
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
        typer.echo(f"attnzoo {attnzoo.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        from attnzoo.cli.render import facts, say

        say("attnzoo: a zoo of attention mechanisms that compose into timm backbones.\n")
        facts(FIRST_STEPS, indent=2)


def main() -> None:
    """Run a verb and end the program with its exit code."""
    app(prog_name="attnzoo")

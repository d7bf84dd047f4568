"""`attnzoo translate RUN [TEXT ...]`: translate with a trained model."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from attnzoo.cli import completion
from attnzoo.cli.eval import Accelerate
from attnzoo.cli.list import AsJson

WINDOW = 64
"""Batches that are sorted by length together; then their lines are written."""
NAMED = 5
"""How many lines a warning names."""


def translate(
    run: Annotated[Path, typer.Argument(help="Folder of a run on pairs.", autocompletion=completion.runs)],
    text: Annotated[
        list[str] | None,
        typer.Argument(
            help="What to translate, each text by itself; standard input without one.", show_default=False
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="A file in UTF-8, line by line.", show_default=False)
    ] = None,
    beams: Annotated[int, typer.Option(min=1, help="Hypotheses followed at once; 1 is greedy search.")] = 4,
    length_penalty: Annotated[float, typer.Option(help="More favours long translations; 0 is none.")] = 0.6,
    batch: Annotated[int, typer.Option(min=1, help="Lines at once.")] = 32,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most tokens of a translation; the model's own otherwise.", show_default=False
        ),
    ] = None,
    which: Annotated[
        Literal["best", "last"], typer.Option(help="Weights of the best or the last epoch.")
    ] = "best",
    out: Annotated[
        Path | None, typer.Option(help="Where to write; standard output otherwise.", show_default=False)
    ] = None,
    accelerate: Accelerate = False,
    as_json: AsJson = False,
) -> None:
    """Translate texts, a file or standard input: a line for each line, in their order."""
    lines = _lines(text or [], file)
    _check_out(out, file)

    from attnzoo.cli.render import say_json
    from attnzoo.eval.translation import translate as translate_lines
    from attnzoo.train import open_run

    found = replace(open_run(run), accelerated=True) if accelerate else open_run(run)
    vocabularies = found.vocabularies()
    model: Any = found.model(which).to(found.device)
    rows: list[dict[str, Any]] = []
    truncated: list[int] = []
    unfinished: list[int] = []
    with ExitStack() as stack:
        write = stack.enter_context(_writer(out))
        report = stack.enter_context(_progress(len(lines), hidden=bool(text)))
        for start in range(0, len(lines), WINDOW * batch):
            part = lines[start : start + WINDOW * batch]
            made = translate_lines(
                model,
                vocabularies,
                part,
                beams=beams,
                length_penalty=length_penalty,
                batch=batch,
                max_length=max_length,
                report=lambda done, start=start: report(start + done),
            )
            truncated += [start + i for i in made.truncated]
            unfinished += [start + i for i in made.unfinished]
            if as_json:
                rows += [
                    {"text": one, "translation": other, "score": chosen.score, "ended": chosen.ended}
                    for one, other, chosen in zip(part, made.texts, made.hypotheses, strict=True)
                ]
            else:
                for translated in made.texts:
                    write(" ".join(translated.splitlines()))
        if as_json:
            counts = {"truncated": truncated, "unfinished": unfinished}
            what = {"run": str(run), "which": which, "beams": beams, "length_penalty": length_penalty}
            document = what | {"lines": len(lines), "translations": rows} | counts
            if out is None:
                say_json(document)
            else:
                import json

                write(json.dumps(document, indent=2, ensure_ascii=False))
    most = model.max_length
    _warn(truncated, len(lines), f"longer than the {most - 2} tokens that the model reads, and cut")
    _warn(unfinished, len(lines), "not at their end at the greatest length, and their translations cut")


def _lines(texts: Sequence[str], file: Path | None) -> list[str]:
    """What is to be translated.

    Raises:
        ZooError: AZ612, when it is said twice or not at all.
        DataError: AZ709 when the file cannot be read, AZ711 when something is not UTF-8.
    """
    from attnzoo.data.parallel.text import decoded, lines_of
    from attnzoo.errors import ZooError

    if texts and file is not None:
        raise ZooError(
            "AZ612", "there are texts and a file to translate", help="leave the one or the other out"
        )
    if file is not None:
        return lines_of(file)
    if texts:
        return [line for one in texts for line in decoded([os.fsencode(one)], "TEXT")]
    if sys.stdin.isatty():
        raise ZooError(
            "AZ612",
            "there is nothing to translate",
            help='write a text, as in `attnzoo translate RUN "A house."`, or name a --file',
        )
    return list(decoded(sys.stdin.buffer, "standard input"))


def _check_out(out: Path | None, file: Path | None) -> None:
    from attnzoo.errors import ZooError

    if out is not None and file is not None and out.exists() and out.samefile(file):
        raise ZooError(
            "AZ602", f"`{out}` is the file that is translated", help="name another file with --out"
        )


@contextmanager
def _writer(out: Path | None) -> Iterator[Callable[[str], None]]:
    """Writes lines in UTF-8, to standard output or to a file, which is made in the beginning.

    Raises:
        ZooError: AZ602, when the file cannot be written.
    """
    from attnzoo.cli.output import stdout
    from attnzoo.errors import ZooError

    if out is None:
        yield lambda line: typer.echo(line.encode(), file=stdout())
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", encoding="utf-8", newline="\n") as stream:
            yield lambda line: print(line, file=stream)
    except OSError as error:
        raise ZooError(
            "AZ602",
            f"cannot write `{out}`: {(error.strerror or str(error)).lower()}",
            help="name another file with --out",
        ) from None


@contextmanager
def _progress(lines: int, hidden: bool) -> Iterator[Callable[[int], None]]:
    """Tells how many lines are done, on stderr if that is a terminal."""
    if hidden or not sys.stderr.isatty():
        yield lambda done: None
        return
    with typer.progressbar(length=lines, label="translating", show_pos=True, file=sys.stderr) as bar:
        yield lambda done: bar.update(done - bar.pos)


def _warn(which: Sequence[int], of: int, what: str) -> None:
    if not which:
        return
    from attnzoo.cli.render import warn

    named = ", ".join(str(i + 1) for i in which[:NAMED]) + (" ..." if len(which) > NAMED else "")
    verb = "is" if len(which) == 1 else "are"
    warn(f"{len(which)} of {of} lines {verb} {what}: {named}")

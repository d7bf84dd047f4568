"""What a composed model remembers of its recipe, and what goes in and comes out of it, in words."""

from collections.abc import Mapping
from dataclasses import dataclass

from attnzoo.core.card import Given
from attnzoo.hosts.dual import DualInfo
from attnzoo.hosts.info import BackboneInfo, HostInfo
from attnzoo.hosts.pyramid import PyramidInfo, StageInfo
from attnzoo.hosts.seq2seq import Seq2SeqInfo
from attnzoo.hosts.sequence import SequenceInfo


@dataclass(frozen=True)
class Origin:
    """Where a composed model comes from, for `attnzoo.describe`.

    Args:
        recipe: Name of its recipe.
        takes: What goes in and how it becomes tokens, in words.
        gives: What comes out, in words.
        second: What the second stream is, in words; empty where there is none.
    """

    recipe: str
    takes: str
    gives: str
    second: str = ""


def ends(info: HostInfo, pooled: bool) -> tuple[str, str]:
    """What goes in and what comes out, in words.

    Args:
        info: Of the host.
        pooled: Whether something stands at the site `pool`.
    """
    if isinstance(info, Seq2SeqInfo):
        most = f"at most {info.form.max_length} tokens"
        return f"source, {most}, {info.form.source:,} ids", f"target, {most}, {info.form.target:,} ids"
    if isinstance(info, SequenceInfo):
        form = info.form
        what = f"tokens, {form.vocab:,} ids" if form.vocab else f"vectors of {form.width} channels"
        return (
            f"at most {form.max_length} {what}",
            f"{form.outputs:,} output{'' if form.outputs == 1 else 's'} "
            f"{'for the whole' if pooled else 'at every position'}",
        )
    assert isinstance(info, BackboneInfo)
    channels, rows, columns = info.image
    grid, prefix = " × ".join(map(str, info.layout.grid)), info.layout.prefix
    tokens = f"{grid}{f' + {prefix}' if prefix else ''} tokens"
    return (
        f"{channels} × {rows} × {columns} image → {tokens}",
        f"{info.classes} classes" if info.classes else "features",
    )


def second_stream(info: HostInfo) -> str:
    """What the second stream is and its tokens, in words; empty where there is none."""
    return info.second if isinstance(info, DualInfo) else ""


def stages(info: HostInfo) -> tuple[StageInfo, ...]:
    """What each stage of a backbone in stages looks like; nothing of another host."""
    return info.stages if isinstance(info, PyramidInfo) else ()


def arguments(info: BackboneInfo, given: Mapping[str, Given]) -> str:
    """What `forward` of a backbone takes, with the shapes.

    Args:
        info: Of the host.
        given: Maps that the components ask for, by name.
    """
    channels, rows, columns = info.image
    taken = {name: f"{kind} (b {rows} {columns})" for name, kind in given.items()}
    if isinstance(info, DualInfo):
        taken |= {name: f"(b {' '.join(map(str, shape))})" for name, shape in info.inputs.items()}
    return ", ".join(
        [f"images (b {channels} {rows} {columns})", *(f"{name}={what}" for name, what in taken.items())]
    )

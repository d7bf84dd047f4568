"""Probes, run on a model."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from attnzoo.core import Probe
from attnzoo.core.instrument import NEEDS, made, read_call
from attnzoo.errors import PluginError, ZooError
from attnzoo.lab.finding import Finding
from attnzoo.lab.subject import Subject
from attnzoo.lab.timm_models import tapped
from attnzoo.zoo import load_zoo


def probe_of(text: str) -> Probe:
    """A probe as it is written on the command line: `entropy`, or `entropy(tokens="grid")`.

    Args:
        text: A name, with options in brackets.

    Raises:
        ZooError: AZ921, AZ922, what is wrong with it; AZ201, when there is none of this name.
    """
    name, options = read_call(text)
    return made(load_zoo().probes.find(name).value, options)  # type: ignore[return-value]


def probe(
    model: nn.Module | Subject,
    *probes: Probe | str,
    inputs: Tensor | tuple[Tensor, ...] | None = None,
    targets: Tensor | None = None,
    classes: Sequence[str] | None = None,
    **more: Any,
) -> Any:
    """Measure something of a model.

        attnzoo.probe(model, "entropy", inputs=images)
        attnzoo.probe(model, HeadImportance(by="gradient"), inputs=images, targets=labels)

    Args:
        model: A composed model, one of timm's, or a subject that was made before.
        probes: Each made, or written as on the command line.
        inputs: What the model is called with: images (b c y x), or ids (b n), or several tensors.
        targets: True classes (b,), or true tokens (b n) with -100 where none is asked.
        classes: Names of the classes.
        more: As for `Subject.of`: `batch_size`, `kind`, `name`.

    Returns:
        What was found, an `attnzoo.lab.Finding`; of several probes a list.

    Raises:
        ZooError: AZ903, when there is no attention in the model; AZ921, AZ922, what is wrong with a probe; AZ924,
            AZ926, AZ927, what it needs and is not there.
    """
    asked = [probe_of(one) if isinstance(one, str) else one for one in probes]
    if not isinstance(model, Subject) and inputs is None:
        raise ZooError(
            "AZ926",
            "there is nothing to show the model",
            help="hand over inputs: attnzoo.probe(model, 'entropy', inputs=images)",
        )
    if isinstance(model, Subject):
        found = [_measured(one, model) for one in asked]
    else:
        with tapped(model):
            subject = Subject.of(model, inputs, targets, classes=classes, **more)  # type: ignore[arg-type]
            found = [_measured(one, subject) for one in asked]
    return found[0] if len(found) == 1 else found


def _measured(one: Probe, subject: Subject) -> Finding:
    """What one probe finds, once it is certain that there is what it needs."""
    check_needs(one, subject)
    found = one.measure(subject)
    if not isinstance(found, Finding):
        raise PluginError(
            "AZ014",
            f"`{one.card.name}` gives back a {type(found).__name__} where a Finding is due",
            help="this is a fault of the probe: `measure` returns attnzoo.lab.Finding(columns=...)",
        )
    found.probe = one
    return found


def check_needs(one: Probe, subject: Subject) -> None:
    """Refuse a subject that does not have what a probe needs.

    Args:
        one: The probe.
        subject: The model and its data.

    Raises:
        ZooError: AZ924, AZ926, AZ927.
    """
    needs = one.card.needs
    if needs & {"weights", "heads"}:
        subject.able(*sorted(needs & {"heads"}))
    if "labels" in needs:
        for batch in subject.batches:
            subject.targets(batch)
    kinds = {"image": ("images",), "classes": ("images",), "words": ("pairs", "sequences")}
    for need, allowed in kinds.items():
        if need in needs and subject.kind not in allowed:
            raise ZooError(
                "AZ927",
                f"`{one.card.name}` needs {NEEDS[need]}, and `{subject.name}` is given {subject.kind}",
                help="`attnzoo list probes` says what each needs",
            )

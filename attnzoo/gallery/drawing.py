"""Everything that a page shows of a component: drawn, measured and checked, or found in the cache."""

import io
import json
import pickle
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache as once
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from PIL import Image

from attnzoo.bench.mechanisms import Growth
from attnzoo.errors import RunError, ZooError
from attnzoo.gallery import checked as checks
from attnzoo.gallery import cost as costs
from attnzoo.gallery import flow as flows
from attnzoo.gallery import influence as influences
from attnzoo.gallery import maps as looks
from attnzoo.gallery.cache import Cache, dependencies
from attnzoo.gallery.network import BATCH, BRANCHES, LONGER, PLACES, RATE, SEED, STEPS, digits
from attnzoo.gallery.tracing import MOST, Flow
from attnzoo.plot.palette import DPI
from attnzoo.plot.picture import Picture, encoded
from attnzoo.workers import in_processes
from attnzoo.zoo import Entry, load_zoo

COLOURS, SHARP = 128, 2
"""Of a picture: flat areas need few, and files stay small; its pixels for each that it takes on a page."""
BUILT = ("alone", "recipe", "hosts", "zoo")
"""Rooms that take part where a component is built by name."""
CODE = {
    "flow": ("plot", "gallery/flow.py", "gallery/tracing.py", "gallery/drawing.py"),
    "digits": (*BUILT, "plot", "data", "lab", "gallery/network.py", "gallery/influence.py", "gallery/maps.py",
               "gallery/drawing.py"),
    "cost": (*BUILT, "plot", "bench", "gallery/network.py", "gallery/cost.py", "gallery/drawing.py"),
    "checked": ("testing", "gallery/checked.py", "gallery/drawing.py"),
}  # fmt: skip
"""Files and rooms that take part in each piece of work."""


@dataclass(frozen=True)
class Shown:
    """A picture on a page.

    Args:
        path: The PNG.
        text: What is seen, in a sentence, for those who do not see it.
        width, height: In pixels of the page; the file has twice as many.
    """

    path: Path
    text: str
    width: int
    height: int


@dataclass(frozen=True)
class Drawn:
    """What a page shows of a component.

    Args:
        name: `plugin/name`.
        pictures: Of `flow`, `influence`, `maps` and `cost` those that there are.
        numbers: `accuracy`, `tested`, `steps` and `params` of the network of 32 channels, `layer_params` and `flops`
            (by tokens) of a layer of 384; those that there are.
        checked: What the checks found, as `attnzoo.gallery.checked.Checked` has it; None when they could not run.
        missing: What was not drawn, and why.
        seconds: Of processor time that it took.
    """

    name: str
    pictures: dict[str, Shown] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    checked: dict[str, Any] | None = None
    missing: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def draw_all(
    folder: str | Path,
    entries: Sequence[Entry],
    cache: Cache,
    workers: int = 2,
    *,
    measured: Mapping[str, Growth] | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Drawn]:
    """Draw, measure and check components, or take what was kept; one that fails is reported and stops no other.

    Args:
        folder: Where pictures are put; is made.
        entries: Mechanisms, pools and fusions of the zoo.
        cache: What was drawn before.
        workers: Processes, of one thread each; 0 works in this one.
        measured: Times by name, as `attnzoo.bench.mechanisms.read_csv` gives them.
        report: Is told how far it is.

    Returns:
        By `plugin/name`, in the order of the entries.

    Raises:
        ZooError: AZ960 where nothing can be kept, AZ961 where no picture can be put.
    """
    where, found = Path(folder), {}
    measured = measured or {}
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritten(where, error) from None
    jobs = [
        _Job(
            entry,
            cache.folder,
            {name: measured[name] for name in (costs.BASELINE, entry.name) if name in measured},
        )
        for entry in entries
    ]
    for done in _worked(jobs, workers):
        found[done.name] = _put(where, done)
        trouble = f"; not {', '.join(done.missing)}" if done.missing else ""
        report(
            f"{len(found)} of {len(entries)}: {done.name.removeprefix('attnzoo/')}, {done.seconds:.0f} s{trouble}"
        )
    return {entry.full_name: found[entry.full_name] for entry in entries}


def _unwritten(folder: Path, error: OSError) -> ZooError:
    return ZooError(
        "AZ961",
        f"cannot put pictures into `{folder}`: {(error.strerror or str(error)).lower()}",
        help="name a folder that can be written",
    )


def _put(folder: Path, done: Drawn) -> Drawn:
    """Pictures of the cache in the folder, under names that stay."""
    pictures = {}
    for kind, picture in done.pictures.items():
        path = folder / f"{_stem(done.name)}-{kind}{picture.path.suffix}"
        try:
            copyfile(picture.path, path)
        except OSError as error:
            raise _unwritten(folder, error) from None
        pictures[kind] = replace(picture, path=path)
    return replace(done, pictures=pictures)


def _stem(name: str) -> str:
    """A full name as files are called: `softmax`, `wavelets-haar`."""
    return re.sub(r"[^a-zA-Z0-9_.]+", "-", name.removeprefix("attnzoo/"))


# In processes


@dataclass(frozen=True)
class _Job:
    entry: Entry
    cache: Path
    measured: dict[str, Growth]


def _worked(jobs: Sequence[_Job], workers: int) -> Iterator[Drawn]:
    """All results. Where a process ends, the jobs that were under way are done again, each in a process of its own."""
    if workers < 1:
        yield from map(_drawn, jobs)
        return
    left = []
    for job in jobs:
        reason = _unhandable(job)
        if reason:
            yield Drawn(job.entry.full_name, missing=dict.fromkeys(CODE, reason))
        else:
            left.append(job)
    while left:
        try:
            for done in in_processes(_drawn, left, workers=workers):
                left = [job for job in left if job.entry.full_name != done.name]
                yield done
        except RunError:
            suspects, left = left[:workers], left[workers:]  # jobs begin in their order
            for job in suspects:
                yield _alone(job)


def _alone(job: _Job) -> Drawn:
    try:
        return next(in_processes(_drawn, [job], workers=1))
    except RunError:
        return Drawn(job.entry.full_name, missing=dict.fromkeys(CODE, "the process that drew it ended"))


def _unhandable(job: _Job) -> str:
    """Why a component cannot be handed to another process; empty when it can."""
    try:
        pickle.dumps(job)
    except Exception as error:
        return f"it cannot be handed to another process: {error}"
    return ""


def _drawn(job: _Job) -> Drawn:
    """One component, in this process, by one thread."""
    started, threads = time.process_time(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = _Work(job.entry, Cache(job.cache), job.measured).all()
    finally:
        torch.set_num_threads(threads)
    return replace(found, seconds=time.process_time() - started)


# One component


Made = tuple[dict[str, tuple[Picture, str]], dict[str, Any]]
"""Pictures by kind with their texts, and facts."""


@dataclass
class _Work:
    entry: Entry
    cache: Cache
    measured: dict[str, Growth]

    def all(self) -> Drawn:
        """Everything of one component; what fails is named."""
        found = Drawn(self.entry.full_name)
        for part, make, settings in self._parts():
            try:
                pictures, facts = self._part(part, make, settings)
            except ZooError as error:
                if error.code == "AZ960":
                    raise
                found.missing[part] = error.diagnostics[0].message
                continue
            except Exception as error:  # what is foreign may fail in any way
                found.missing[part] = f"{type(error).__name__}: {error}"
                continue
            found.pictures.update(pictures)
            found.missing.update(facts.pop("missing", {}))
            found = replace(found, checked=facts.pop("checked", found.checked))
            found.numbers.update(facts)
        return found

    def _parts(self) -> Iterator[tuple[str, Callable[[], Made], dict[str, Any]]]:
        """What is done, by what, and what it depends on beside source and versions."""
        branches = [load_zoo().mechanisms[name] for name in BRANCHES]
        read = {entry.name: dependencies(entry, ())["component"] for entry in branches}
        baseline = dependencies(load_zoo().mechanisms[costs.BASELINE], ())["component"]
        training = {
            "steps": STEPS,
            "longer": LONGER,
            "batch": BATCH,
            "rate": RATE,
            "seed": SEED,
            "places": PLACES,
        }
        yield "flow", self._flow, {"most": MOST, "places": flows.PLACES}
        yield "digits", self._digits, {"training": training, "branches": read}
        yield "cost", self._cost, {"measured": repr(self.measured), "branches": read, "baseline": baseline}
        yield "checked", self._checked, {"examples": checks.EXAMPLES}

    def _part(
        self, part: str, make: Callable[[], Made], settings: dict[str, Any]
    ) -> tuple[dict[str, Shown], dict[str, Any]]:
        """Facts and pictures of one piece of work, made once."""
        depends_on = dependencies(self.entry, CODE[part], colours=COLOURS, sharp=SHARP, **settings)
        stem, made = _stem(self.entry.full_name), once(make)
        images = once(lambda: {kind: _png(picture) for kind, (picture, _) in made()[0].items()})

        def facts() -> bytes:
            texts = {kind: text for kind, (_, text) in made()[0].items()}
            sizes = {kind: images()[kind][1] for kind in texts}
            return json.dumps(
                {"texts": texts, "sizes": sizes, "facts": made()[1]}, ensure_ascii=False
            ).encode()

        kept = json.loads(
            self.cache.file(f"{stem}-{part}.json", depends_on, facts).read_text(encoding="utf-8")
        )
        pictures = {}
        for kind, text in kept["texts"].items():
            path = self.cache.file(f"{stem}-{kind}.png", depends_on, lambda kind=kind: images()[kind][0])  # type: ignore[misc]
            pictures[kind] = Shown(path, text, *kept["sizes"][kind])
        return pictures, kept["facts"]

    def _flow(self) -> Made:
        found = flows.trace(self.entry)
        return {"flow": (flows.draw(found), _flow_text(self.entry.name, found))}, {}

    def _digits(self) -> Made:
        found, network = influences.influence(self.entry)
        pictures = {"influence": (influences.draw(found), _influence_text(found))}
        facts: dict[str, Any] = {
            "accuracy": found.accuracy, "tested": found.tested, "steps": found.steps, "params": found.params,
            "network": found.note,
        }  # fmt: skip
        try:
            image = digits(network.side)[1].images[influences.SHOWN : influences.SHOWN + 1]
            seen = looks.shown(network, image)
        except Exception as error:  # the other picture stays
            return pictures, facts | {"missing": {"maps": f"{type(error).__name__}: {error}"}}
        if seen.heads:
            pictures["maps"] = looks.draw(seen), _maps_text(self.entry.name, seen)
        elif seen.absent:
            facts["missing"] = {"maps": "; ".join(dict.fromkeys(seen.absent.values()))}
        else:
            facts["missing"] = {"maps": "its maps do not lie on the tokens of the image"}
        return pictures, facts

    def _cost(self) -> Made:
        found = costs.cost(self.entry, self.measured)
        facts: dict[str, Any] = {
            "layer_params": found.params,
            "flops": {str(n): f for n, f in found.flops.items()},
        }
        if not any(found.flops.values()) and not found.times:
            return {}, facts | {"missing": {"cost": found.why}}
        return {"cost": (costs.draw(found), _cost_text(found))}, facts

    def _checked(self) -> Made:
        return {}, {"checked": checks.checked(self.entry).as_dict()}


def _png(picture: Picture) -> tuple[bytes, tuple[int, int]]:
    """A picture with few colours, sharp on screens of many pixels; its width and height on a page."""
    picture.set_dpi(SHARP * DPI)
    image = Image.open(io.BytesIO(encoded(picture, "png"))).convert("RGB")
    out = io.BytesIO()
    # those that are rare too: marks and the ends of scales
    few = image.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(out, format="PNG", optimize=True)
    return out.getvalue(), (image.width // SHARP, image.height // SHARP)


# What is said to those who do not see a picture


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _flow_text(name: str, found: Flow) -> str:
    sources = [box.label for box in found.boxes if box.kind == "input"]
    between = list(dict.fromkeys(box.label for box in found.boxes if box.kind not in ("input", "output")))
    way = f" through {_listed(between)}" if between else ""
    return f"Data flow of {name}: from {_listed(sources)}{way} to the output.{f' {found.note}' if found.note else ''}"


def _influence_text(found: influences.Influence) -> str:
    reached = 100 * float((found.first > 0).double().mean())
    tokens = found.first[0].numel()
    whose = "the one output" if found.pools else "four outputs"
    text = f"Influence of {tokens} tokens on {whose} of {found.name}: "
    text += f"at initialisation {reached:.0f} % of them have any"
    if found.trained is not None:
        text += f", trained on digits half of it comes from {_half(found):.0f} %"
    return f"{text}."


def _half(found: influences.Influence) -> float:
    """The fewest tokens, in percent, from which half of the influence comes, the mean over queries."""
    assert found.trained is not None
    flat = found.trained.flatten(1).double().sort(descending=True).values
    total = flat.sum(dim=1, keepdim=True)
    needed = (flat.cumsum(dim=1) < total / 2).sum(dim=1) + (total[:, 0] > 0)
    return float(100 * needed.double().mean() / flat.shape[1])


def _maps_text(name: str, seen: looks.Looks) -> str:
    said = []
    for branch, heads in seen.heads.items():
        shares = heads.double() * heads[0].numel()
        between = f"{float(shares.min()):.3g} to {float(shares.max()):.3g}"
        said.append(f"{branch} {between}" if len(seen.heads) > 1 else between)
    against = (
        ", below 0 what counts against it" if any((heads < 0).any() for heads in seen.heads.values()) else ""
    )
    return (
        f"Heat maps of {name} on a handwritten digit, after training: a token is looked at {_listed(said)} times as "
        f"much as if all were alike{against}."
    )


def _cost_text(found: costs.Cost) -> str:
    said = []
    for what, own, other in (
        ("GFLOPs", found.flops, found.baseline),
        ("ms", found.times, found.baseline_times),
    ):
        both = sorted(own.keys() & other.keys())
        if both and any(own.values()):
            unit = 1e9 if what == "GFLOPs" else 1.0
            ends = f"{own[both[0]] / unit:.3g} to {own[both[-1]] / unit:.3g} {what}"
            beside = f"{other[both[0]] / unit:.3g} to {other[both[-1]] / unit:.3g}"
            against = "" if found.name == costs.BASELINE else f" ({costs.BASELINE}: {beside})"
            said.append(f"{ends} for {both[0]} to {both[-1]} tokens{against}")
    return f"Cost of one layer of {found.name} as tokens grow: {', '.join(said)}."

# The public names and where they come from: type checkers read this file, and what it names is imported on demand.

from . import plot
from .alone.build import create
from .alone.multihead import as_mha
from .bench.diff import diff
from .catalogue.explain import explain
from .catalogue.lists import list_fusions, list_interventions, list_mechanisms, list_probes, list_recipes
from .catalogue.models import describe
from .catalogue.pages import show
from .core import (
    NO_MASK,
    AuxiliaryLosses,
    Card,
    Family,
    Fraction,
    Fused,
    FusedHeads,
    Fusion,
    FusionCard,
    Head,
    Here,
    InstrumentCard,
    Intervention,
    Law,
    Layout,
    Mask,
    Mechanism,
    MultiHead,
    NonNegativeInt,
    Paper,
    PositiveFloat,
    PositiveInt,
    Probe,
    Site,
    Start,
    Tap,
    auxiliary_losses,
    find_taps,
    watch,
)
from .errors import ZooError
from .grafting import distil, graft, save_graft, ungraft
from .hf import register_with_transformers
from .inference import accelerate
from .lab.finding import Finding
from .lab.intervening import intervene
from .lab.probing import probe
from .lab.subject import Subject
from .recipe import compose, compose_file
from .train.repro import repro
from .zoo import load_zoo
from .zoo.hookspecs import hookimpl

__all__ = [
    "AuxiliaryLosses",
    "Card",
    "Family",
    "Finding",
    "Fraction",
    "Fused",
    "FusedHeads",
    "Fusion",
    "FusionCard",
    "Head",
    "Here",
    "InstrumentCard",
    "Intervention",
    "Law",
    "Layout",
    "Mask",
    "Mechanism",
    "MultiHead",
    "NO_MASK",
    "NonNegativeInt",
    "Paper",
    "PositiveFloat",
    "PositiveInt",
    "Probe",
    "Site",
    "Start",
    "Subject",
    "Tap",
    "ZooError",
    "accelerate",
    "as_mha",
    "auxiliary_losses",
    "compose",
    "compose_file",
    "create",
    "describe",
    "diff",
    "distil",
    "explain",
    "find_taps",
    "graft",
    "hookimpl",
    "intervene",
    "list_fusions",
    "list_interventions",
    "list_mechanisms",
    "list_probes",
    "list_recipes",
    "load_zoo",
    "plot",
    "probe",
    "register_with_transformers",
    "repro",
    "save_graft",
    "show",
    "ungraft",
    "watch",
]

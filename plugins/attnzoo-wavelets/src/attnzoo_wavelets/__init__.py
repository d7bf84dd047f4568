"""Haar wavelets for attnzoo: the mechanism `haar`, the fusion `subband`, the probe `band_energy`, the intervention
`without_details`, the recipe `wavelet_vit`."""

from pathlib import Path

from attnzoo import hookimpl

from attnzoo_wavelets.band_energy import BandEnergy
from attnzoo_wavelets.haar import Haar
from attnzoo_wavelets.subband import Subband
from attnzoo_wavelets.without_details import WithoutDetails

__all__ = ["BandEnergy", "Haar", "Subband", "WithoutDetails"]
ATTNZOO_API = 2


@hookimpl
def attnzoo_mechanisms():
    """The mechanisms of this plugin."""
    return [Haar]


@hookimpl
def attnzoo_fusions():
    """The fusions of this plugin."""
    return [Subband]


@hookimpl
def attnzoo_probes():
    """The probes of this plugin."""
    return [BandEnergy]


@hookimpl
def attnzoo_interventions():
    """The interventions of this plugin."""
    return [WithoutDetails]


@hookimpl
def attnzoo_recipes():
    """The recipes of this plugin."""
    return [Path(__file__).parent / "recipes"]

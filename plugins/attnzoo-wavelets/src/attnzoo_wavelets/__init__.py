"""Haar wavelets for attnzoo: the mechanism `haar`, the fusion `subband`, the recipe `wavelet_vit`."""

from pathlib import Path

from attnzoo import hookimpl

from attnzoo_wavelets.haar import Haar
from attnzoo_wavelets.subband import Subband

__all__ = ["Haar", "Subband"]
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
def attnzoo_recipes():
    """The recipes of this plugin."""
    return [Path(__file__).parent / "recipes"]

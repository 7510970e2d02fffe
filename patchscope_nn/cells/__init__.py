"""Cells: every fully resolved combination of a Patchscope, and the sweep they make up. Pure."""

from patchscope_nn.cells.cells import Cell, Cells, Weighted
from patchscope_nn.cells.sweep import Sweep, expand

__all__ = ["Cell", "Cells", "Sweep", "Weighted", "expand"]

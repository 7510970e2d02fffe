"""Turns a Patchscope and its data rows into cells: every combination, fully resolved. Pure.

entry.py     a resolved data row
cell.py      a cell
resolve.py   resolves data rows: fills and tokenizes prompts, resolves positions and layers
checks.py    checks that a Patchscope's fields fit its models and each other
cells.py     makes the cells of the resolved rows
expand.py    the whole sweep: resolves the rows, then makes the cells
vectors.py   states from files
"""

from patchscope_nn.sweep.cell import Cell, Weighted
from patchscope_nn.sweep.cells import Cells
from patchscope_nn.sweep.entry import Entry, PositionSet, Row, Source, Term, VectorAt
from patchscope_nn.sweep.expand import Sweep, expand
from patchscope_nn.sweep.resolve import Resolver

__all__ = [
    "Cell",
    "Cells",
    "Entry",
    "PositionSet",
    "Resolver",
    "Row",
    "Source",
    "Sweep",
    "Term",
    "VectorAt",
    "Weighted",
    "expand",
]

"""A Patchscope and its data rows -> the cells: every combination, fully resolved. Pure.

resolve.py   rows: prompts filled and tokenized, positions and layers counted out
cells.py     the cells of the sweep
expand.py    both together
vectors.py   states that are given and not read
"""

from patchscope_nn.sweep.cells import Cell, Cells, Weighted
from patchscope_nn.sweep.entry import Entry, Row, Source, Term, Together, VectorAt
from patchscope_nn.sweep.expand import Sweep, expand
from patchscope_nn.sweep.resolve import Resolver

__all__ = [
    "Cell",
    "Cells",
    "Entry",
    "Resolver",
    "Row",
    "Source",
    "Sweep",
    "Term",
    "Together",
    "VectorAt",
    "Weighted",
    "expand",
]

"""Turns a Patchscope and its data rows into cells: every combination, fully resolved. Pure.

entry.py     a resolved data row
cell.py      cells as arrays, and a cell as an object
resolve.py   resolves data rows: fills and tokenizes prompts, resolves positions and layers
checks.py    checks that a Patchscope's fields fit its models and each other
cells.py     makes the cells of the resolved rows
states.py    numbers for what source passes read
digests.py   digests of what cells are, from which their seeds are made
keys.py      finds cells by what they are, whichever sweep they are in
expand.py    the whole sweep: resolves the rows, then makes the cells
vectors.py   states from files
"""

from patchscope_nn.sweep.cell import Cell, CellBlock, Flags, Weighted
from patchscope_nn.sweep.cells import Cells, Origin
from patchscope_nn.sweep.entry import Entry, PositionSet, Row, Source, Term, VectorAt
from patchscope_nn.sweep.expand import Sweep, Writes, expand
from patchscope_nn.sweep.keys import CellIndex, Keys
from patchscope_nn.sweep.resolve import Resolver
from patchscope_nn.sweep.states import StateNumbers

__all__ = [
    "Cell",
    "CellBlock",
    "CellIndex",
    "Cells",
    "Entry",
    "Flags",
    "Keys",
    "Origin",
    "PositionSet",
    "Resolver",
    "Row",
    "Source",
    "StateNumbers",
    "Sweep",
    "Term",
    "VectorAt",
    "Weighted",
    "Writes",
    "expand",
]

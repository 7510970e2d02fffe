"""Keys of cells: numbers of 64 bits that a cell has in every sweep that it belongs to."""

from __future__ import annotations

import json
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from patchscope_nn._util.ragged import Ints
from patchscope_nn.sweep.digests import digests, mix

if TYPE_CHECKING:
    from patchscope_nn.sweep.expand import Sweep

Keys = npt.NDArray[np.uint64]


class CellIndex:
    """Finds the cells of a sweep by their keys.

    A cell's key is a digest of its content (its seed) and of its data row, so that it does not depend on
    which rows, layers, positions or controls are swept beside it. Cells that are equal in both, such as those
    of equal data rows, are counted in the order of the sweep, and the count is part of their keys.

    Args:
        sweep: The sweep.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    @cached_property
    def keys(self) -> Keys:
        """(n_cells,) the key of each cell."""
        rows = digests(json.dumps(row, sort_keys=True, default=repr) for row in self._sweep.rows)
        keys = np.empty(len(self._sweep.cells), np.uint64)
        for block in self._sweep.cells.blocks():
            keys[block.number] = mix(mix(block.seed.astype(np.uint64)) + rows[block.row])
        order = np.argsort(keys, kind="stable")
        ordered, place = keys[order], np.arange(len(keys))
        is_first = np.append(True, ordered[1:] != ordered[:-1])
        count = place - np.maximum.accumulate(np.where(is_first, place, 0))
        keys[order] = np.where(is_first, ordered, mix(ordered + count.astype(np.uint64)))
        return keys

    @cached_property
    def _sorted(self) -> tuple[Keys, Ints]:
        order = np.argsort(self.keys)
        return self.keys[order], order

    def find(self, keys: Keys) -> Ints:
        """Return the number of the cell that has each key; -1 if no cell of the sweep has it."""
        known, order = self._sorted
        place = np.searchsorted(known, keys).clip(max=len(known) - 1)
        return np.where(known[place] == keys, order[place], -1)

    def rows(self, numbers: Ints) -> Ints:
        """Return the data row of each cell; a cell is given by its number."""
        cells = self._sweep.cells
        return cells.row_of[np.searchsorted(cells.starts, numbers, side="right") - 1]

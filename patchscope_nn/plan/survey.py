"""Deduplication: cells of different data rows that are the same run, run once. Transformation 1 of a plan."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from patchscope_nn._util.ragged import Ints
from patchscope_nn.plan.passes import Optimisations
from patchscope_nn.sweep import Flags, Sweep


class Survey(NamedTuple):
    """The result of one pass over all cells.

    Attributes:
        digest: Hex digest of the cells that will run and of the models' names.
        kinds: How many of the cells that are not done are of each kind.
        served_by: For each cell, the number of the cell whose result it has.
        runs: True for each cell that runs.
    """

    digest: str
    kinds: dict[str | None, int]
    served_by: Ints
    runs: Flags


def survey_cells(sweep: Sweep, done: Collection[int] | Ints, optimisations: Optimisations) -> Survey:
    """Transformation 1: find copies, and count the cells that run."""
    cells = sweep.cells
    left = np.ones(len(cells), bool)
    left[np.fromiter(done, np.int64, len(done))] = False
    seeds = np.empty(len(cells), np.int64)
    counts = np.zeros(len(cells.controls), np.int64)
    for block in cells.blocks():
        seeds[block.number] = block.seed
        counts += np.bincount(block.control[left[block.number]], minlength=len(counts))
    served_by = np.arange(len(cells))
    if optimisations.deduplication:
        _, first, inverse = np.unique(seeds[left], return_index=True, return_inverse=True)
        served_by[left] = served_by[left][first][inverse]
    digest = hashlib.sha256(repr((sweep.source.name, sweep.target.name)).encode())
    digest.update(seeds[left].tobytes())
    runs = left & (served_by == np.arange(len(cells)))
    digest.update(runs.tobytes())
    # As in an entry, whose unpatched cells come first.
    kinds = sorted(zip(cells.controls, counts.tolist(), strict=True), key=lambda kind: kind[0] != "unpatched")
    return Survey(digest.hexdigest(), {kind: count for kind, count in kinds if count}, served_by, runs)

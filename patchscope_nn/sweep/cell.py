"""Cells as arrays (`CellBlock`), and one cell as an object (`Cell`), for people and messages. Frozen data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from patchscope_nn._util.ragged import Ints
from patchscope_nn.spec import Control
from patchscope_nn.sweep.entry import PositionSet, Source

if TYPE_CHECKING:
    from patchscope_nn.sweep.cells import Cells

#: A term of a weighted sum of states: its source, its positions and its weight.
Weighted = tuple[Source, PositionSet, float]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One fully resolved combination of a source state, a place to write it, and a control.

    The fields are those of `CellBlock`, with what its numbers stand for. A field is `None` if the run lacks
    that part: an unpatched run has no source and no l*, and a write that needs no state has no source. Cells
    with the same seed are the same run.

    Attributes:
        control: None for the real cell, else the control's name.
        source: S, an index into `Sweep.source_prompts`; or a vector from a file.
        source_positions: i, in ascending order. Several positions are patched together.
        source_layer: l.
        terms: All terms, if the written state is a sum of several states; else empty.
        target_positions: i*, as many as i.
        unseen: The tokens that i* cannot attend to.
        reference: The (prompt, position) whose unpatched next-token distribution the cell is compared with.
    """

    number: int
    row: int
    entry: int
    control: Control | None
    source: Source | None
    source_positions: PositionSet | None
    source_layer: int | None
    terms: tuple[Weighted, ...]
    target_prompt: int
    target_positions: PositionSet
    target_layer: int | None
    scale: float
    sample: int
    unseen: PositionSet
    reference: tuple[int, int] | None
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class CellBlock(Sequence[Cell]):
    """Some cells of a sweep as arrays, with one number for each cell. Its items are `Cell` objects.

    An unpatched cell reads and writes nothing: its `read`, `layer` and `target_layer` have no meaning.

    Attributes:
        cells: All cells of the sweep, with what the numbers below refer to.
        number: The index of each cell in the sweep.
        entry: Its entry.
        control: An index into `cells.controls`.
        patched: False for unpatched cells.
        read: What is read, as an index into `cells.reads`; without meaning if the write needs no state.
        layer: l; -1 is the input of block 0.
        positions: i*, as an index into `cells.positions`.
        target_layer: l*.
        scale: The factor that multiplies the mapped state.
        sample: Which draw of the noise on T's embeddings.
        reference: The last source position, as an index into `cells.origins`, whose unpatched distribution
            the cell is compared with; without meaning if nothing is compared.
        seed: A digest of the cell's content, independent of its row. It seeds the cell's random numbers.
    """

    cells: Cells
    number: Ints
    entry: Ints
    control: Ints
    patched: Flags
    read: Ints
    layer: Ints
    positions: Ints
    target_layer: Ints
    scale: npt.NDArray[np.float64]
    sample: Ints
    reference: Ints
    seed: Ints

    @property
    def row(self) -> Ints:
        """The data row of each cell."""
        return self.cells.row_of[self.entry]

    @property
    def target_prompt(self) -> Ints:
        """T of each cell, as an index into `Sweep.target_prompts`."""
        return self.cells.target_of[self.entry]

    @property
    def stateful(self) -> Flags:
        """True for cells that write a state."""
        return self.patched & self.cells.writes_state

    def take(self, index: Any) -> CellBlock:
        """Return some of the cells, chosen by an index, a slice or a mask."""
        arrays = {
            field.name: getattr(self, field.name)[index] for field in fields(self) if field.name != "cells"
        }
        return CellBlock(cells=self.cells, **arrays)

    def __len__(self) -> int:
        return len(self.number)

    def __iter__(self) -> Iterator[Cell]:
        cells, stateful = self.cells, self.stateful.tolist()
        columns = zip(*(getattr(self, field.name).tolist() for field in fields(self)[1:]), strict=True)
        for reads, column in zip(stateful, columns, strict=True):
            number, entry, control, patched, read, layer, at, target, scale, sample, ref, seed = column
            source, positions, terms = cells.read_terms(read) if reads else (None, None, ())
            yield Cell(
                number=number,
                row=int(cells.row_of[entry]),
                entry=entry,
                control=cells.controls[control],
                source=source,
                source_positions=positions,
                source_layer=layer if patched else None,
                terms=terms,
                target_prompt=int(cells.target_of[entry]),
                target_positions=cells.positions.row(at),
                target_layer=target if patched else None,
                scale=scale,
                sample=sample,
                unseen=cells.unseen(entry, control, at, seed) if patched else (),
                reference=cells.reference(ref) if cells.compares else None,
                seed=seed,
            )

    @overload
    def __getitem__(self, index: int) -> Cell: ...
    @overload
    def __getitem__(self, index: slice) -> CellBlock: ...
    def __getitem__(self, index: int | slice) -> Cell | CellBlock:
        if isinstance(index, slice):
            return self.take(index)
        place = range(len(self))[index]
        return next(iter(self.take(slice(place, place + 1))))

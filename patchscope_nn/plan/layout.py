"""The layout of a packed target pass: many patched runs as segments of one sequence. Pure.

A pass is one sequence in which no token is run twice:

* the **prefix**, tokens that all its target prompts begin with, is run once and kept as keys and values;
* a **trunk** is the rest of one clean target prompt, as far as anything needs it;
* a **branch** is one cell's own tokens, from its first patched one on. It attends to the prefix, to its
  trunk up to where it branches off, and to itself.

A branch of layer l* is, below l*, what its trunk is; so it enters there, and the blocks below never see it
(late entry). Tokens are ordered by where they enter: at every block those that run are the first so many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from patchscope_nn.spec import read_position
from patchscope_nn.spec.layers import EMBED
from patchscope_nn.sweep import Cell, Sweep

#: Trunks enter before block 0, as embeddings.
START = EMBED - 1


class Segment(NamedTuple):
    """Tokens first..last-1 of a target prompt, at `offset` of the sequence.

    Attributes:
        prompt: T, a number.
        first: Its first token's position.
        last: One past its last.
        enters: The layer after which it joins the sequence; `START` for the embeddings.
        offset: Where its first token stands in the sequence.
        trunk: For a branch, the place of its trunk in `Layout.segments`; None where it needs none.
        cell: For a branch, its cell, a place in the pass.
    """

    prompt: int
    first: int
    last: int
    enters: int
    offset: int
    trunk: int | None
    cell: int | None

    def at(self, position: int) -> int:
        """Where a position of its prompt stands in the sequence."""
        return self.offset + position - self.first


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A pass as a sequence of segments.

    Attributes:
        prefix: The tokens that were run before, and are shared.
        segments: In the order of the sequence.
        of_cell: For each cell of the pass, the place of the segment that is read: its branch, or for an
            unpatched cell its trunk.
        depth: How many blocks the pass runs through.
    """

    prefix: int
    depth: int
    segments: tuple[Segment, ...]
    of_cell: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """The tokens of the sequence."""
        return sum(one.last - one.first for one in self.segments)

    def running(self, layer: int) -> int:
        """How many tokens have joined once block `layer` has run (`EMBED`: before block 0)."""
        return sum(one.last - one.first for one in self.segments if one.enters <= layer)


def branches_at(cell: Cell) -> int:
    """The position from which on a cell differs from its clean prompt."""
    return min(cell.target_positions)


def needed_end(sweep: Sweep, cell: Cell) -> int:
    """How many tokens of its target prompt a cell needs: all it writes, and as far as it is read."""
    whole = len(sweep.target_prompts[cell.target_prompt].ids)
    written = max(cell.target_positions) + 1
    if not sweep.scope.readout.unembeds:
        return written
    return max(
        written, whole if sweep.scope.readout.decodes else read_position(sweep.scope.readout, whole) + 1
    )


def needs_clean(sweep: Sweep, cell: Cell) -> bool:
    """Whether a branch needs the clean states of its own tokens: to stand in for them below l*.

    Their keys and values, where decoding goes on from them; the states themselves, where not every token of
    the branch is written, or what is replaced is looked at: by the mapping, the write or the readout.
    """
    scope = sweep.scope
    written = len(cell.target_positions) == needed_end(sweep, cell) - branches_at(cell)
    looks = scope.mapping == "target_norm" or scope.target.mode != "replace"
    looks = looks or scope.readout.looks_at_replaced
    return scope.readout.decodes or not written or looks


def lay_out(sweep: Sweep, cells: Sequence[Cell], *, prefix: int, late_entry: bool) -> Layout:
    """Lay the cells of a pass out as one sequence.

    Args:
        sweep: The sweep.
        cells: The pass's cells.
        prefix: How many tokens of every target prompt are shared and already run.
        late_entry: Whether branches enter at l*; else all enter before block 0.

    Returns:
        The layout.
    """
    last = sweep.target.n_layers - 1
    trunks: dict[int, int] = {}
    for cell in cells:
        trunks[cell.target_prompt] = max(
            trunks.get(cell.target_prompt, 0), _trunk_end(sweep, cell, last, late_entry=late_entry)
        )
    placed: list[tuple[int, int | None, int, int]] = [
        (START, None, prompt, end) for prompt, end in trunks.items() if end > prefix
    ]
    placed += [
        (_enters(cell, late_entry=late_entry), number, cell.target_prompt, branches_at(cell))
        for number, cell in enumerate(cells)
        if cell.target_layer is not None
    ]
    placed.sort(key=lambda one: one[0])
    return _place(sweep, cells, placed, prefix)


def _enters(cell: Cell, *, late_entry: bool) -> int:
    return START if cell.target_layer is None or not late_entry else cell.target_layer


def _trunk_end(sweep: Sweep, cell: Cell, last: int, *, late_entry: bool) -> int:
    """How many tokens of its clean prompt a cell needs."""
    if cell.target_layer is None:
        whole = len(sweep.target_prompts[cell.target_prompt].ids)
        return read_position(sweep.scope.readout, whole) + 1
    if late_entry and needs_clean(sweep, cell):
        return needed_end(sweep, cell)
    # What enters after the last block attends to nothing any more.
    return 0 if late_entry and cell.target_layer == last else branches_at(cell)


def _place(
    sweep: Sweep, cells: Sequence[Cell], placed: list[tuple[int, int | None, int, int]], prefix: int
) -> Layout:
    segments: list[Segment] = []
    trunk_of: dict[int, int] = {}
    of_cell: dict[int, int] = {}
    offset = 0
    for enters, number, prompt, position in placed:
        if number is None:
            first, end = prefix, position
        else:
            first, end = position, needed_end(sweep, cells[number])
        segments.append(Segment(prompt, first, end, enters, offset, trunk_of.get(prompt), number))
        if number is None:
            trunk_of[prompt] = len(segments) - 1
        else:
            of_cell[number] = len(segments) - 1
        offset += end - first
    read = (
        of_cell[number] if number in of_cell else trunk_of[cell.target_prompt]
        for number, cell in enumerate(cells)
    )
    depth = sweep.target.n_layers
    if not sweep.scope.readout.unembeds:  # what was written can be read where it was written
        written = [max(cell.target_layer, 0) for cell in cells if cell.target_layer is not None]
        depth = 1 + max(written, default=-1)  # the input of block 0 is written where block 0 begins
    return Layout(prefix=prefix, depth=depth, segments=tuple(segments), of_cell=tuple(read))

"""The layout of a packed target pass: many patched runs as segments of one sequence. Pure.

A pass is one sequence in which no token is run twice:

* The **prefix** is the tokens that all target prompts of the step begin with. It runs once and is kept as
  keys and values.
* A **trunk** is the rest of one unpatched target prompt, as far as any cell needs it.
* A **branch** is one cell's own tokens, from its first patched token on. It attends to the prefix, to its
  trunk up to the token where it branches off, and to itself.

Below l*, a branch equals its trunk. So it joins the sequence at l*, and the blocks below never run it (late
entry). Tokens are ordered by the layer at which they join, so that the tokens that run at a block are always
the first ones of the sequence.
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
        prompt: T, the number of a prompt.
        first: The position of its first token.
        last: The position after its last token.
        enters: The layer after which it joins the sequence; `START` for the embeddings.
        offset: The index of its first token in the sequence.
        trunk: For a branch, the index of its trunk in `Layout.segments`; None if it needs no trunk.
        cell: For a branch, the index of its cell in the pass; None for a trunk.
    """

    prompt: int
    first: int
    last: int
    enters: int
    offset: int
    trunk: int | None
    cell: int | None

    def at(self, position: int) -> int:
        """Return the index in the sequence of a position of its prompt."""
        return self.offset + position - self.first


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A pass as a sequence of segments.

    Attributes:
        prefix: How many tokens of the shared prefix come before the sequence.
        depth: How many blocks the pass runs through.
        segments: The segments, in the order of the sequence.
        of_cell: For each cell of the pass, the index of the segment that is read: its branch, or for an
            unpatched cell its trunk.
    """

    prefix: int
    depth: int
    segments: tuple[Segment, ...]
    of_cell: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """The number of tokens of the sequence."""
        return sum(segment.last - segment.first for segment in self.segments)

    def running(self, layer: int) -> int:
        """Return how many tokens have joined after block `layer` has run (`EMBED`: before block 0)."""
        return sum(segment.last - segment.first for segment in self.segments if segment.enters <= layer)


def branches_at(cell: Cell) -> int:
    """Return the first position at which a cell differs from its unpatched prompt."""
    return min(cell.target_positions)


def needed_end(sweep: Sweep, cell: Cell) -> int:
    """Return how many tokens of its target prompt a cell needs: up to its last written or read position."""
    whole = len(sweep.target_prompts[cell.target_prompt].ids)
    written = max(cell.target_positions) + 1
    if not sweep.scope.readout.unembeds:
        return written
    return max(
        written, whole if sweep.scope.readout.decodes else read_position(sweep.scope.readout, whole) + 1
    )


def needs_clean(sweep: Sweep, cell: Cell) -> bool:
    """Return whether a branch needs the unpatched states of its own tokens, which its trunk then computes.

    If the readout decodes, it needs their keys and values in the blocks below l*. It needs the states at l*
    if not every token of the branch is written, or if the mapping, the write or the readout uses the states
    that are replaced.
    """
    scope = sweep.scope
    written = len(cell.target_positions) == needed_end(sweep, cell) - branches_at(cell)
    uses_replaced = scope.mapping == "target_norm" or scope.target.mode != "replace"
    uses_replaced = uses_replaced or scope.readout.looks_at_replaced
    return scope.readout.decodes or not written or uses_replaced


def lay_out(sweep: Sweep, cells: Sequence[Cell], *, prefix: int, late_entry: bool) -> Layout:
    """Lay the cells of a pass out as one sequence.

    Args:
        sweep: The sweep.
        cells: The cells of the pass.
        prefix: How many tokens of every target prompt are in the shared prefix.
        late_entry: True if branches enter at l*; else they enter before block 0.

    Returns:
        The layout.
    """
    last = sweep.target.n_layers - 1
    trunks: dict[int, int] = {}
    for cell in cells:
        trunks[cell.target_prompt] = max(
            trunks.get(cell.target_prompt, 0), _trunk_end(sweep, cell, last, late_entry=late_entry)
        )
    segments = [
        Segment(prompt, prefix, end, START, 0, None, None) for prompt, end in trunks.items() if end > prefix
    ]
    for number, cell in enumerate(cells):
        if cell.target_layer is not None:
            first, end = branches_at(cell), needed_end(sweep, cell)
            enters = cell.target_layer if late_entry else START
            segments.append(Segment(cell.target_prompt, first, end, enters, 0, None, number))
    segments.sort(key=lambda segment: segment.enters)
    return _place(sweep, cells, segments, prefix)


def _trunk_end(sweep: Sweep, cell: Cell, last: int, *, late_entry: bool) -> int:
    """Return how many tokens of its unpatched prompt a cell needs; `last` is the last layer."""
    if cell.target_layer is None:
        whole = len(sweep.target_prompts[cell.target_prompt].ids)
        return read_position(sweep.scope.readout, whole) + 1
    if late_entry and needs_clean(sweep, cell):
        return needed_end(sweep, cell)
    # A branch that joins after the last block does not attend to anything.
    return 0 if late_entry and cell.target_layer == last else branches_at(cell)


def _place(sweep: Sweep, cells: Sequence[Cell], ordered: Sequence[Segment], prefix: int) -> Layout:
    """Set the offsets and the trunks of ordered segments; each trunk comes before its branches."""
    segments: list[Segment] = []
    trunk_of: dict[int, int] = {}
    of_cell: dict[int, int] = {}
    offset = 0
    for index, segment in enumerate(ordered):
        segments.append(segment._replace(offset=offset, trunk=trunk_of.get(segment.prompt)))
        if segment.cell is None:
            trunk_of[segment.prompt] = index
        else:
            of_cell[segment.cell] = index
        offset += segment.last - segment.first
    read = (
        of_cell[number] if number in of_cell else trunk_of[cell.target_prompt]
        for number, cell in enumerate(cells)
    )
    depth = sweep.target.n_layers
    if not sweep.scope.readout.unembeds:  # the readout takes the states that were written
        written = [max(cell.target_layer, 0) for cell in cells if cell.target_layer is not None]
        depth = 1 + max(written, default=-1)  # the input of block 0 is written when block 0 is called
    return Layout(prefix=prefix, depth=depth, segments=tuple(segments), of_cell=tuple(read))

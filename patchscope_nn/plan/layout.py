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

from dataclasses import dataclass

import numpy as np

from patchscope_nn._util.ragged import Ints, first_seen
from patchscope_nn.spec.layers import EMBED
from patchscope_nn.sweep import CellBlock, Flags, Sweep

#: Trunks enter before block 0, as embeddings.
START = EMBED - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """A pass as a sequence of segments, in their order. A segment is a part of a target prompt.

    Attributes:
        prefix: How many tokens of the shared prefix come before the sequence.
        depth: How many blocks the pass runs through.
        prompt: T of each segment.
        first: The position of its first token.
        count: The number of its tokens.
        enters: The layer after which it joins the sequence; `START` for the embeddings.
        offset: The index of its first token in the sequence.
        is_branch: True for a branch, False for a trunk.
        trunk_offset: The offset of its trunk; that of a trunk itself.
        trunk_count: The number of tokens of its trunk, which begins after the prefix; 0 for none.
        of_cell: For each cell of the pass, the segment that is read: its branch, or for an unpatched cell its
            trunk.
    """

    prefix: int
    depth: int
    prompt: Ints
    first: Ints
    count: Ints
    enters: Ints
    offset: Ints
    is_branch: Flags
    trunk_offset: Ints
    trunk_count: Ints
    of_cell: Ints

    @property
    def n_tokens(self) -> int:
        """The number of tokens of the sequence."""
        return int(self.count.sum())

    def running(self, layer: int) -> int:
        """Return how many tokens have joined after block `layer` has run (`EMBED`: before block 0)."""
        return int(self.count[self.enters <= layer].sum())

    def at(self, segment: Ints, position: Ints) -> Ints:
        """Return the indices in the sequence of positions of prompts, each in a segment."""
        return self.offset[segment] + position - self.first[segment]


def branches_at(block: CellBlock) -> Ints:
    """Return the first position at which each cell differs from its unpatched prompt."""
    return block.cells.first_position[block.positions]


def needed_end(sweep: Sweep, block: CellBlock) -> Ints:
    """Return how many tokens of its target prompt each cell needs: up to its last written or read one."""
    written = block.cells.last_position[block.positions] + 1
    readout = sweep.scope.readout
    if not readout.unembeds:
        return written
    prompt = block.target_prompt
    read = sweep.target_tokens.counts[prompt] if readout.decodes else sweep.read_at[prompt] + 1
    return np.maximum(written, read)


def needs_clean(sweep: Sweep, block: CellBlock) -> Flags:
    """Return whether branches need the unpatched states of their own tokens; their trunk then computes these.

    If the readout decodes, it needs their keys and values in the blocks below l*. It needs the states at l*
    if not every token of the branch is written, or if the mapping, the write or the readout uses the states
    that are replaced.
    """
    scope = sweep.scope
    uses_replaced = scope.mapping == "target_norm" or scope.target.mode != "replace"
    if scope.readout.decodes or uses_replaced or scope.readout.looks_at_replaced:
        return np.ones(len(block), bool)
    written = block.cells.positions.counts[block.positions]
    return written != needed_end(sweep, block) - branches_at(block)


def lay_out(sweep: Sweep, block: CellBlock, *, prefix: int, late_entry: bool) -> Layout:
    """Lay the cells of a pass out as one sequence.

    Args:
        sweep: The sweep.
        block: The cells of the pass.
        prefix: How many tokens of every target prompt are in the shared prefix.
        late_entry: True if branches enter at l*; else they enter before block 0.
    """
    prompts, trunk_of = first_seen(block.target_prompt)
    ends = np.zeros(len(prompts), np.int64)
    np.maximum.at(ends, trunk_of, _trunk_end(sweep, block, late_entry=late_entry))
    exists = ends > prefix
    patched = block.take(block.patched)
    first = branches_at(patched)
    n_trunks, n_branches = int(exists.sum()), len(patched)

    prompt = np.concatenate([prompts[exists], patched.target_prompt])
    starts = np.concatenate([np.full(n_trunks, prefix), first])
    counts = np.concatenate([ends[exists], needed_end(sweep, patched)]) - starts
    enters = np.full(n_trunks + n_branches, START)
    if late_entry:
        enters[n_trunks:] = patched.target_layer
    # Each trunk comes before its branches: it enters first, and the order of equals stays.
    order = np.argsort(enters, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    offset = np.cumsum(counts[order]) - counts[order]

    # Trunks without tokens have no segment; the cells that would attend to them attend to the prefix alone.
    trunk_place = np.zeros(len(prompts), np.int64)
    trunk_place[exists] = place[:n_trunks]
    of_segment = np.concatenate([exists.nonzero()[0], trunk_of[block.patched]])
    has_trunk = exists[of_segment]
    of_cell = trunk_place[trunk_of]
    of_cell[block.patched] = place[n_trunks:]
    trunk_offset = np.where(has_trunk, offset[trunk_place[of_segment]] if len(offset) else 0, 0)
    trunk_count = np.where(has_trunk, ends[of_segment] - prefix, 0)
    depth = sweep.target.n_layers
    if not sweep.scope.readout.unembeds:  # the readout takes the states that were written
        # The input of block 0 is written when block 0 is called.
        depth = 1 + max(int(patched.target_layer.max(initial=-1)), 0 if n_branches else -1)
    return Layout(
        prefix=prefix,
        depth=depth,
        prompt=prompt[order],
        first=starts[order],
        count=counts[order],
        enters=enters[order],
        offset=offset,
        is_branch=order >= n_trunks,
        trunk_offset=trunk_offset[order],
        trunk_count=trunk_count[order],
        of_cell=of_cell,
    )


def _trunk_end(sweep: Sweep, block: CellBlock, *, late_entry: bool) -> Ints:
    """Return how many tokens of its unpatched prompt each cell needs."""
    ends = branches_at(block)
    if late_entry:
        # A branch that joins after the last block does not attend to anything.
        ends = np.where(block.target_layer == sweep.target.n_layers - 1, 0, ends)
        ends = np.where(needs_clean(sweep, block), needed_end(sweep, block), ends)
    return np.where(block.patched, ends, sweep.read_at[block.target_prompt] + 1)

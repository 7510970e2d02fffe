"""Source sharing: plans which source prompts a step runs, and what it reads. Transformation 4 of a plan.

The first step that needs a prompt runs it, once, for every state that a cell of this or any later step reads
from it. States that later steps need are kept until the last entry that reads the prompt has run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from patchscope_nn._util.ragged import Ints
from patchscope_nn.plan.budget import Budget, Costs
from patchscope_nn.plan.cut import cut
from patchscope_nn.plan.passes import Optimisations, SourcePass
from patchscope_nn.sweep import CellBlock, Flags, Sweep

#: A padded batch has no mask that grows with its square, so it may be longer than a packed sequence by this.
_LONGER = 4
#: This many tokens keep a processor busy. Beyond them, padding may make a batch larger by this factor.
_ENOUGH, _PADDED = 96, 1.1


class Reads(NamedTuple):
    """The source passes of a step, and the states that it takes over and hands on; see `Step`."""

    passes: tuple[SourcePass, ...]
    carried: Ints
    kept: Ints
    dropped: Ints


class Reader:
    """Plans the source passes of each step, in order.

    Args:
        sweep: The sweep.
        budget: The most that a pass may hold.
        optimisations: The optimisations that are on.
        entries: The entries, in the order in which they run.
        carries: True if a step may use states that an earlier one has read.
    """

    def __init__(
        self,
        sweep: Sweep,
        budget: Budget,
        optimisations: Optimisations,
        *,
        entries: Ints,
        carries: bool = True,
    ) -> None:
        self.sweep, self.budget = sweep, budget
        self.sharing, self.mixed = optimisations.source_sharing, optimisations.mixed_lengths
        self.costs, self.lengths = Costs(info=sweep.source), sweep.source_tokens.counts
        self._entries, self._carries = entries, carries
        self._held = np.empty(0, np.int64)
        #: For each prompt, the index in `entries` of the last that reads it; -1 for none.
        self._last = np.full(len(self.lengths), -1)
        if carries and sweep.scope.source.vector is None:
            origins, index = sweep.cells.origins_of(entries)
            np.maximum.at(self._last, sweep.cells.origin_source[origins], index)

    def read(self, block: CellBlock, *, next_entry: int) -> Reads:
        """Plan the source passes of a step.

        Args:
            block: The step's cells.
            next_entry: Index, in the order of entries, of the first that has cells in later steps.

        Returns:
            The passes, and the states that are taken over and handed on.
        """
        needed = self.sweep.reads_of(block)
        if not self.sharing:
            none, each = needed[:0], needed[:, None]
            alone = (self._pass(self._prompts(state), state, whole=True) for state in each)
            return Reads(tuple(alone), none, none, none)
        held = np.isin(needed, self._held)
        carried, fresh = needed[held], needed[~held]
        prompts = np.unique(self._prompts(fresh))
        later = prompts[self._last[prompts] >= next_entry]
        if len(later):
            fresh = np.union1d(fresh, self._all(later))
        passes = tuple(self._passes(fresh))
        kept = np.concatenate([fresh[:0], *(source_pass.states for source_pass in passes)])
        kept = kept[self._last[self._prompts(kept)] >= next_entry]
        self._held = np.concatenate([self._held, kept])
        ended = self._last[self._prompts(self._held)] < next_entry
        dropped, self._held = self._held[ended], self._held[~ended]
        return Reads(passes, carried, kept, dropped)

    def _prompts(self, states: Ints) -> Ints:
        """Return the prompt of each state."""
        return self.sweep.cells.origin_source[self.sweep.states.origin(states)]

    def _all(self, prompts: Ints) -> Ints:
        """Return every state that any cell of the plan reads from some prompts."""
        sweep, cells = self.sweep, self.sweep.cells
        states = [np.empty(0, np.int64)]
        if sweep.scope.target.needs_state:
            origins = np.unique(cells.origins_of(self._entries)[0])
            states.append(sweep.states.hidden(origins[:, None], np.array(cells.layers)).ravel())
        if cells.compares:
            states.append(sweep.states.final(cells.references_of(self._entries)))
        together = np.concatenate(states)
        return together[np.isin(self._prompts(together), prompts)]

    def _passes(self, states: Ints) -> Iterator[SourcePass]:
        """Cut prompts, sorted by length, into batches within the budget."""
        numbers = self.sweep.states
        of_state = self._prompts(states)
        prompts = np.unique(of_state)
        prompts = prompts[np.argsort(self.lengths[prompts], kind="stable")]
        positions = self.sweep.cells.origin_positions
        final = numbers.is_final(states)
        ends = positions.values[positions.starts[numbers.origin(states)]]
        read_back = np.zeros(len(self.lengths), np.int64)
        np.maximum.at(read_back, of_state[final], (self.lengths[of_state] - ends)[final])

        def fits(batch: slice) -> Flags:
            return self._fits(self.lengths[prompts[batch]], read_back[prompts[batch]])

        for batch in cut(len(prompts), fits, most=self.budget.max_rows):
            yield self._pass(prompts[batch], states[np.isin(of_state, prompts[batch])])

    def _fits(self, lengths: Ints, read_back: Ints) -> Flags:
        """Return whether the first n prompts of these lengths are a batch within the budget, for each n."""
        rows = np.arange(1, len(lengths) + 1)
        padded, tokens = rows * lengths, np.cumsum(lengths)
        read = np.maximum.accumulate(read_back)
        fits = self.costs.batch(rows, lengths, read=read, decodes=False) <= self.budget.memory
        fits &= padded <= _LONGER * self.costs.longest_sequence(shared_attention=False)
        # Padding is wasted work: once a batch keeps the processor busy, only little padding is allowed.
        wasteful = (tokens > _ENOUGH) & (padded > _PADDED * tokens) if self.mixed else padded > tokens
        return fits & ~wasteful

    def _pass(self, prompts: Ints, states: Ints, *, whole: bool = False) -> SourcePass:
        layers, n_layers = self.sweep.states.layer(states), self.sweep.source.n_layers
        depth = n_layers if whole else min(n_layers, 1 + max(0, int(layers.max(initial=0))))
        return SourcePass(prompts, states[np.argsort(layers, kind="stable")], depth, whole)

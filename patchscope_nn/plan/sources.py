"""Source sharing: plans which source prompts a step runs, and what it reads. Transformation 4 of a plan.

The first step that needs a prompt runs it, once, for every state that a cell of this or any later step reads
from it. States that later steps need are kept until the last entry that reads the prompt has run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from patchscope_nn.plan.budget import Budget, Costs
from patchscope_nn.plan.passes import Optimisations, SourcePass, State
from patchscope_nn.sweep import Cell, Sweep, VectorAt, Weighted


def states_of(sweep: Sweep, cell: Cell) -> Iterator[State]:
    """Yield the states that a cell needs from source passes."""
    for layer, _ in sweep.writes(cell):
        for prompt, positions, _ in terms_of(cell):
            if not isinstance(prompt, VectorAt):
                yield State(prompt, positions, layer)
    if cell.reference is not None:
        prompt, position = cell.reference
        yield State(prompt, (position,), None)


def terms_of(cell: Cell) -> tuple[Weighted, ...]:
    """Return the terms of the state that a cell writes: none, one, or those of a weighted sum."""
    if cell.source is None or cell.source_positions is None:
        return ()
    return cell.terms or ((cell.source, cell.source_positions, 1.0),)


class Reads(NamedTuple):
    """The source passes of a step, and the states that it takes over and hands on.

    Attributes:
        passes: The source passes.
        carried: States that it takes over from earlier steps.
        kept: States of these passes that later steps need.
        dropped: States that no later step needs.
    """

    passes: tuple[SourcePass, ...]
    carried: tuple[State, ...] = ()
    kept: tuple[State, ...] = ()
    dropped: tuple[State, ...] = ()


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
        entries: Sequence[int],
        carries: bool = True,
    ) -> None:
        self.sweep, self.budget = sweep, budget
        self.sharing, self.mixed = optimisations.source_sharing, optimisations.mixed_lengths
        self.costs = Costs(info=sweep.source)
        self._held: dict[State, None] = {}
        self._last: dict[int, int] = {}
        self._readers: dict[int, list[int]] = {}
        for place, entry in enumerate(entries):
            for prompt, _ in sweep.cells.sources(entry):
                self._last[prompt] = place if carries else -1
                self._readers.setdefault(prompt, []).append(entry)

    def read(self, cells: Sequence[Cell], *, next_entry: int) -> Reads:
        """Plan the source passes of a step.

        Args:
            cells: The step's cells.
            next_entry: Index, in the order of entries, of the first that has cells in later steps.

        Returns:
            The passes, and the states that are taken over and handed on.
        """
        needed = dict.fromkeys(state for cell in cells for state in states_of(self.sweep, cell))
        if not self.sharing:
            return Reads(tuple(SourcePass((state.prompt,), (state,), whole=True) for state in needed))
        carried = tuple(state for state in needed if state in self._held)
        missing = [state for state in needed if state not in self._held]
        fresh: dict[int, dict[State, None]] = {}
        for state in missing:
            fresh.setdefault(state.prompt, {})[state] = None
        for prompt, states in fresh.items():
            if self._last[prompt] >= next_entry:
                states.update(dict.fromkeys(self._all(prompt)))
        passes = tuple(self._batches(fresh))
        read = (state for source in passes for state in source.states)
        kept = tuple(state for state in read if self._last[state.prompt] >= next_entry)
        self._held |= dict.fromkeys(kept)
        dropped = tuple(state for state in self._held if self._last[state.prompt] < next_entry)
        for state in dropped:
            del self._held[state]
        return Reads(passes, carried, kept, dropped)

    def _all(self, prompt: int) -> Iterator[State]:
        """Yield every state that any cell reads from a prompt."""
        cells = self.sweep.cells
        for entry in dict.fromkeys(self._readers[prompt]):
            for source, position_sets in cells.sources(entry):
                if source == prompt:
                    for positions in position_sets:
                        yield from (State(prompt, positions, layer) for layer in cells.layers)
                        if cells.compares and prompt == self.sweep.entries[entry].source:
                            yield State(prompt, positions[-1:], None)

    def _batches(self, fresh: dict[int, dict[State, None]]) -> Iterator[SourcePass]:
        """Cut prompts, sorted by length, into batches within the budget."""
        batch: list[int] = []
        for prompt in sorted(fresh, key=self._length):
            if batch and not self._fits([*batch, prompt], fresh):
                yield _batch(batch, fresh)
                batch = []
            batch.append(prompt)
        if batch:
            yield _batch(batch, fresh)

    def _fits(self, batch: Sequence[int], fresh: dict[int, dict[State, None]]) -> bool:
        width = self._length(batch[-1])
        read = max(self._read_back(prompt, fresh[prompt]) for prompt in batch)
        size = self.costs.batch(len(batch), width, read=read, decodes=False)
        tokens = sum(map(self._length, batch))
        if not self.mixed and len(batch) * width > tokens:
            return False
        wide = len(batch) * width > _LONGER * self.costs.longest_sequence(shared_attention=False)
        # Padding is wasted work: once a batch keeps the processor busy, only little padding is allowed.
        padded = tokens > _ENOUGH and len(batch) * width > _PADDED * tokens
        fits = len(batch) <= self.budget.max_rows and size <= self.budget.memory
        return fits and not wide and not padded

    def _read_back(self, prompt: int, states: dict[State, None]) -> int:
        """Return how many positions, counted from the end, must be unembedded."""
        finals = [state.positions[-1] for state in states if state.layer is None]
        return self._length(prompt) - min(finals) if finals else 0

    def _length(self, prompt: int) -> int:
        return len(self.sweep.source_prompts[prompt].ids)


#: A padded batch has no mask that grows with its square, so it may be longer than a packed sequence by this.
_LONGER = 4
#: This many tokens keep a processor busy. Beyond them, padding may make a batch larger by this factor.
_ENOUGH, _PADDED = 96, 1.1


def _batch(prompts: Sequence[int], fresh: dict[int, dict[State, None]]) -> SourcePass:
    return SourcePass(tuple(prompts), tuple(state for prompt in prompts for state in fresh[prompt]))

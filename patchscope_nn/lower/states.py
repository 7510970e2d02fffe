"""Where the states of a step are in its table: those that are given or read, and sums of these."""

from __future__ import annotations

import numpy as np
import torch

from patchscope_nn._util.ragged import Ints, ranges
from patchscope_nn.body.program import Sums
from patchscope_nn.plan import Plan, Step
from patchscope_nn.sweep.vectors import load_vector


class StateTable:
    """The rows of a step's table of states (see `body/program.py`).

    Args:
        plan: The plan.
        step: The step.

    Attributes:
        sweep: The sweep.
        vectors: (n, d_model) the vectors from files that the step writes; None if it writes others.
        sums: The states that are sums of others; None if there are none.
    """

    def __init__(self, plan: Plan, step: Step) -> None:
        self.sweep = sweep = plan.sweep
        states, final = step.states, sweep.states.is_final(step.states)
        self._hidden, self._starts, self._counts = self._sorted(states[~final])
        self._finals = states[final]
        self._by_number = np.argsort(self._finals)
        self.vectors: torch.Tensor | None = None
        self.sums: Sums | None = None
        self._sums: Ints = np.empty(0, np.int64)
        writes = sweep.writes(step.cells)
        if sweep.scope.source.vector is not None:
            self._sources = np.unique(self._source(step.cells.read[step.cells.stateful]))
            loaded = [load_vector(sweep.vectors[number]) for number in self._sources.tolist()]
            self.vectors = torch.cat(loaded) if loaded else None
        elif sweep.scope.target.needs_state:
            self._add(step.cells.read[writes.cell], writes.layer)

    def _sorted(self, states: Ints) -> tuple[Ints, Ints, Ints]:
        """Return states in ascending order, with their first row in the table and their number of rows."""
        counts = self.sweep.cells.origin_positions.counts[self.sweep.states.origin(states)]
        order = np.argsort(states)
        return states[order], (np.cumsum(counts) - counts)[order], counts[order]

    def rows(self, states: Ints) -> Ints:
        """Return the rows of hidden states, one after the other."""
        place = np.searchsorted(self._hidden, states)
        return ranges(self._starts[place], self._counts[place])

    def finals(self, states: Ints) -> Ints:
        """Return the rows of distributions in their own table."""
        return self._by_number[np.searchsorted(self._finals, states, sorter=self._by_number)]

    def of(self, read: Ints, layer: Ints) -> tuple[Ints, Ints]:
        """Return the first row and the number of rows of the states that are written.

        Args:
            read: The state without its layer, an index into `Cells.reads`.
            layer: l.
        """
        if self.vectors is not None:
            return np.searchsorted(self._sources, self._source(read)), np.ones_like(read)
        if self.sums is not None:
            place = np.searchsorted(self._sums, self.sweep.states.hidden(read, layer))
            return self._sum_starts[place], self._sum_counts[place]
        place = np.searchsorted(self._hidden, self._state(read, layer))
        return self._starts[place], self._counts[place]

    def _source(self, read: Ints) -> Ints:
        """Return the source of the first origin of each state."""
        cells = self.sweep.cells
        return cells.origin_source[cells.read_origins.values[cells.read_origins.starts[read]]]

    def _state(self, read: Ints, layer: Ints) -> Ints:
        """Return the states that are written, which are no sums."""
        origins = self.sweep.cells.read_origins
        return self.sweep.states.hidden(origins.values[origins.starts[read]], layer)

    def _add(self, read: Ints, layer: Ints) -> None:
        """Add the sums that are written to the end of the table, each once."""
        cells, mean = self.sweep.cells, self.sweep.scope.source.mean == "positions"
        if not mean and (cells.read_origins.counts == 1).all() and (cells.read_weights == 1).all():
            return
        self._sums, first = np.unique(self.sweep.states.hidden(read, layer), return_index=True)
        read, layer = read[first], layer[first]
        origins, index = cells.read_origins.take(read)
        weights = cells.read_weights[ranges(cells.read_origins.starts[read], cells.read_origins.counts[read])]
        place = np.searchsorted(self._hidden, self.sweep.states.hidden(origins, layer[index]))
        counts = self._counts[place]
        n_rows = np.ones(len(read), np.int64)
        if not mean:
            n_rows[index] = counts
        starts = np.cumsum(n_rows) - n_rows
        into = np.repeat(starts[index], counts)
        if not mean:
            into = ranges(starts[index], counts)
        self._sum_starts, self._sum_counts = starts + int(self._counts.sum()), n_rows
        self.sums = Sums(
            count=int(n_rows.sum()),
            states=torch.from_numpy(ranges(self._starts[place], counts)),
            weights=torch.from_numpy(np.repeat(weights / (counts if mean else 1), counts)),
            into=torch.from_numpy(into),
        )

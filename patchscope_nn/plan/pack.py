"""Row packing: plans the target passes of a step. Transformation 5 of a plan.

Cells run as segments of one sequence if the architecture allows it, else as rows of a padded batch. They are
sorted by l*, so that the cells of a pass enter at nearly the same block and run together from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from patchscope_nn.models import ELSEWHERE
from patchscope_nn.plan.budget import Budget, Costs
from patchscope_nn.plan.layout import branches_at, lay_out, needed_end
from patchscope_nn.plan.passes import Optimisations, TargetPass
from patchscope_nn.spec import SITES, read_position
from patchscope_nn.sweep import Cell, Sweep

#: A sequence may be this much longer if it also holds unpatched prompts, or if its readout decodes.
_LONGER = 4
#: The most tokens after the prefix that a token may attend to separately.
FEW_OWN = 8


def packs(sweep: Sweep, optimisations: Optimisations) -> bool:
    """Return whether the cells of a sweep run as segments of one sequence."""
    wanted = optimisations.prefix_sharing or optimisations.late_entry
    target = sweep.scope.target
    possible = SITES[target.site].packs and not target.alters
    decodes = not sweep.scope.readout.decodes or from_cache(sweep, optimisations)
    return wanted and possible and decodes and sweep.target.supports("packing")


def from_cache(sweep: Sweep, optimisations: Optimisations) -> bool:
    """Return whether decoding continues from the prompt's keys and values, instead of reading it again.

    A write at every decoded token needs keys and values, also with the optimisation off. So does a model
    whose prompt tokens attend to later ones: reading the prompt again would change it.
    """
    needed = sweep.scope.target.every_step or not sweep.target.supports("causal")
    return sweep.target.supports("cache") and (optimisations.cached_decoding or needed)


def shares_attention(
    sweep: Sweep, optimisations: Optimisations, cells: Sequence[Cell], *, prefix: int
) -> bool:
    """Return whether the tokens of a packed pass attend to the prefix and to their own tokens separately.

    This pays only on a CPU, where attention over one long sequence is slow. If the model runs elsewhere, its
    device is not known here; then the pass checks it, and uses a mask if it is not a CPU.
    """
    info = sweep.target
    possible = info.supports("shared_attention") and info.device in {"cpu", ELSEWHERE}
    if not (optimisations.shared_attention and possible):
        return False
    longest = max(needed_end(sweep, cell) for cell in cells)
    windows = (window for window in info.architecture.windows if window is not None)
    return longest - prefix <= FEW_OWN and longest <= min(windows, default=longest)


class Packer:
    """Plans the target passes of each step.

    Args:
        sweep: The sweep.
        budget: The most that a pass may hold.
        optimisations: The optimisations that are on.
    """

    def __init__(self, sweep: Sweep, budget: Budget, optimisations: Optimisations) -> None:
        self.sweep, self.optimisations = sweep, optimisations
        self.costs, self.memory = Costs(info=sweep.target), budget.memory
        self.max_rows = budget.max_rows if optimisations.row_packing else 1
        self.decodes = sweep.scope.readout.decodes
        self.caches = self.decodes and from_cache(sweep, optimisations)

    def passes(self, cells: Sequence[Cell], prefix: Sequence[int]) -> tuple[TargetPass, ...]:
        """Plan the passes of a step.

        Args:
            cells: The cells of the step.
            prefix: The tokens that all their target prompts begin with, which run once.

        Returns:
            The passes; their cells are indices into `cells`.
        """
        if not packs(self.sweep, self.optimisations):
            return self.padded(cells)
        shared = len(prefix)

        def sort_key(place: int) -> tuple[Any, ...]:
            cell = cells[place]
            # Cells that need the same trunk are neighbours.
            trunk = (cell.target_prompt,) if branches_at(cell) > shared else ()
            return self._lengths(cell), trunk, _layer_key(cell)

        late = self.optimisations.late_entry
        return tuple(
            TargetPass(
                batch,
                lay_out(self.sweep, [cells[place] for place in batch], prefix=shared, late_entry=late),
            )
            for batch in self._sequences(cells, sorted(range(len(cells)), key=sort_key), shared)
        )

    def padded(self, cells: Sequence[Cell]) -> tuple[TargetPass, ...]:
        """Plan the passes of a step as rows of padded batches, sorted by length."""
        mixed = self.optimisations.mixed_lengths

        def sort_key(place: int) -> tuple[Any, ...]:
            lengths = () if mixed else self._lengths(cells[place])
            return self.row_tokens(cells[place]), lengths, _layer_key(cells[place])

        def fits(batch: Sequence[int]) -> bool:
            longest = cells[batch[-1]]  # it also reads the most positions, since rows are sorted
            if not mixed and self._lengths(longest) != self._lengths(cells[batch[0]]):
                return False
            width, read = self.row_tokens(longest), self.read_back(longest)
            size = self.costs.batch(len(batch), width, read=read, decodes=self.caches)
            return size <= self.memory and len(batch) <= self.max_rows

        return tuple(TargetPass(batch) for batch in cut(sorted(range(len(cells)), key=sort_key), fits))

    def _sequences(
        self, cells: Sequence[Cell], places: Sequence[int], prefix: int
    ) -> Iterator[tuple[int, ...]]:
        """Cut a step's cells into packed passes; each unpatched prompt counts once in a pass."""
        shared = shares_attention(self.sweep, self.optimisations, cells, prefix=prefix)
        longest = self.costs.longest_sequence(shared_attention=shared)
        most_own = longest * (_LONGER if self.decodes and not shared else 1)
        verdict = self.sweep.target.verdict
        limit = None if verdict is None else verdict.longest_packed
        batch: list[int] = []
        trunks: set[int] = set()
        own_tokens = tokens = width = 0
        for place in places:
            cell = cells[place]
            own = needed_end(self.sweep, cell) - branches_at(cell)
            trunk = needed_end(self.sweep, cell) - prefix
            more = own + trunk * (cell.target_prompt not in trunks)
            if batch:
                rows, wide = len(batch) + 1, max(width, self.row_tokens(cell))
                full = rows > self.max_rows or self._bytes(tokens + more, prefix, rows, wide) > self.memory
                full = full or (limit is not None and prefix + tokens + more > limit)
                long = own_tokens + own > most_own or tokens + more > _LONGER * longest
                last = cells[batch[-1]]
                other = self._lengths(cell) != self._lengths(last)
                if full or other or (long and own_tokens):
                    yield tuple(batch)
                    batch, trunks, own_tokens, tokens, width = [], set(), 0, 0, 0
                    more = own + trunk
            batch.append(place)
            trunks.add(cell.target_prompt)
            own_tokens += own
            tokens += more
            width = max(width, self.row_tokens(cell))
        if batch:
            yield tuple(batch)

    def _bytes(self, tokens: int, prefix: int, rows: int, width: int) -> int:
        read = rows if self.optimisations.lean_readout else tokens
        packed = self.costs.packed(tokens, prefix, read)
        return packed + 2 * self.costs.cached(rows * width) if self.decodes else packed

    def read_back(self, cell: Cell) -> int:
        """Return how many positions of a cell's row, counted from the end, are unembedded."""
        whole = self.prompt_tokens(cell)
        return (
            whole - read_position(self.sweep.scope.readout, whole)
            if self.optimisations.lean_readout
            else whole
        )

    def _lengths(self, cell: Cell) -> tuple[int, ...]:
        """Return the lengths that all cells of a packed pass must share with this one; empty for none.

        Prompts that decode from one packed pass must have the same length, since they have no padding.
        Without mixed lengths, appended tokens must have the same length too.
        """
        if not self.optimisations.mixed_lengths:
            return (self.prompt_tokens(cell), *map(len, self.sweep.entries[cell.entry].continuations))
        return (self.prompt_tokens(cell),) if self.decodes else ()

    def prompt_tokens(self, cell: Cell) -> int:
        """Return the number of tokens of a cell's target prompt."""
        return len(self.sweep.target_prompts[cell.target_prompt].ids)

    def row_tokens(self, cell: Cell) -> int:
        """Return the number of tokens of a cell's row, including those that its readout appends."""
        return self.prompt_tokens(cell) + appended(self.sweep, cell)


def appended(sweep: Sweep, cell: Cell) -> int:
    """Return how many tokens a readout appends to a cell's prompt at most."""
    continuations = sweep.entries[cell.entry].continuations
    return max([sweep.scope.readout.decoded, *map(len, continuations)])


def cut(items: Sequence[int], fits: Callable[[Sequence[int]], bool]) -> Iterator[tuple[int, ...]]:
    """Yield items, in order, in the longest batches that fit. A single item always fits."""
    batch: list[int] = []
    for item in items:
        if batch and not fits([*batch, item]):
            yield tuple(batch)
            batch = []
        batch.append(item)
    if batch:
        yield tuple(batch)


def _layer_key(cell: Cell) -> tuple[int, ...]:
    """A sort key: by l*, unpatched cells first."""
    return () if cell.target_layer is None else (cell.target_layer,)

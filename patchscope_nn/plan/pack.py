"""Row packing: the target passes of a step. Transformation 5 of a plan.

Cells go as segments of one sequence where the architecture lets them, else as rows of a padded batch. They
are sorted by l*, so that the cells of a pass enter at nearly the same block and run together from there on.
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

#: With clean prompts among them, or where decoding goes on for long, a sequence may be this much longer.
_LONGER = 4
#: Up to so many tokens behind the prefix are picked out one by one.
FEW_OWN = 8


def packs(sweep: Sweep, optimisations: Optimisations) -> bool:
    """Whether the cells of a sweep go as segments of one sequence."""
    wanted = optimisations.prefix_sharing or optimisations.late_entry
    target = sweep.scope.target
    possible = SITES[target.site].packs and not target.alters
    decodes = not sweep.scope.readout.decodes or from_cache(sweep, optimisations)
    return wanted and possible and decodes and sweep.target.supports("packing")


def from_cache(sweep: Sweep, optimisations: Optimisations) -> bool:
    """Whether decoding goes on from the keys and values of the prompt, and not from the prompt read again.

    A write at every decoded token is defined on keys and values. So is what a model that is not causal over
    its prompt decodes.
    """
    needed = sweep.scope.target.every_step or not sweep.target.supports("causal")
    return sweep.target.supports("cache") and (optimisations.cached_decoding or needed)


def shares_attention(
    sweep: Sweep, optimisations: Optimisations, cells: Sequence[Cell], *, prefix: int
) -> bool:
    """Whether the tokens of a packed pass attend to its prefix apart from their own few tokens.

    Only on a CPU, whose attention over one long sequence is slow, and where PyTorch gives what it takes. Of a
    model elsewhere the device is not known here; the pass itself looks, and makes a mask where it is no CPU.
    """
    info = sweep.target
    possible = info.supports("shared_attention") and info.device in {"cpu", ELSEWHERE}
    if not (optimisations.shared_attention and possible):
        return False
    longest = max(needed_end(sweep, cell) for cell in cells)
    windows = (window for window in info.architecture.windows if window is not None)
    return longest - prefix <= FEW_OWN and longest <= min(windows, default=longest)


class Packer:
    """Plans the target passes of one step after the other."""

    def __init__(self, sweep: Sweep, budget: Budget, optimisations: Optimisations) -> None:
        self.sweep, self.optimisations = sweep, optimisations
        self.costs, self.memory = Costs(info=sweep.target), budget.memory
        self.max_rows = budget.max_rows if optimisations.row_packing else 1
        self.decodes = sweep.scope.readout.decodes
        self.caches = self.decodes and from_cache(sweep, optimisations)

    def passes(self, cells: Sequence[Cell], prefix: Sequence[int]) -> tuple[TargetPass, ...]:
        """Serve the cells of a step.

        Args:
            cells: The cells.
            prefix: What all their target prompts begin with, to be run once.

        Returns:
            The passes, whose cells are places in `cells`.
        """
        if not packs(self.sweep, self.optimisations):
            return self.padded(cells)
        shared = len(prefix)

        def entry(place: int) -> tuple[Any, ...]:
            cell = cells[place]
            # Cells that need a trunk stand beside those that need the same one.
            trunk = (cell.target_prompt,) if branches_at(cell) > shared else ()
            return self._lengths(cell), trunk, _layer_key(cell)

        late = self.optimisations.late_entry
        return tuple(
            TargetPass(
                batch,
                lay_out(self.sweep, [cells[place] for place in batch], prefix=shared, late_entry=late),
            )
            for batch in self._sequences(cells, sorted(range(len(cells)), key=entry), shared)
        )

    def padded(self, cells: Sequence[Cell]) -> tuple[TargetPass, ...]:
        """Serve the cells of a step as rows of padded batches: prompts of one length together."""
        mixed = self.optimisations.mixed_lengths

        def entry(place: int) -> tuple[Any, ...]:
            alike = () if mixed else self._lengths(cells[place])
            return self.row_tokens(cells[place]), alike, _layer_key(cells[place])

        def fits(batch: Sequence[int]) -> bool:
            longest = cells[batch[-1]]  # and is read as far back as any, since they are sorted
            if not mixed and self._lengths(longest) != self._lengths(cells[batch[0]]):
                return False
            width, read = self.row_tokens(longest), self.read_back(longest)
            size = self.costs.batch(len(batch), width, read=read, decodes=self.caches)
            return size <= self.memory and len(batch) <= self.max_rows

        return tuple(TargetPass(batch) for batch in cut(sorted(range(len(cells)), key=entry), fits))

    def _sequences(
        self, cells: Sequence[Cell], places: Sequence[int], prefix: int
    ) -> Iterator[tuple[int, ...]]:
        """Cut a step's cells into passes; a clean prompt counts once a pass."""
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
        """How many positions of a cell's row, from the end, reach the unembedding."""
        whole = self.prompt_tokens(cell)
        return (
            whole - read_position(self.sweep.scope.readout, whole)
            if self.optimisations.lean_readout
            else whole
        )

    def _lengths(self, cell: Cell) -> tuple[int, ...]:
        """The lengths that the cells of a packed pass have in common; empty where they may all differ.

        Rows that decode from one pass have prompts of one length, since they have no padding. Without mixed
        lengths, what is appended has one length too.
        """
        if not self.optimisations.mixed_lengths:
            return (self.prompt_tokens(cell), *map(len, self.sweep.entries[cell.entry].continuations))
        return (self.prompt_tokens(cell),) if self.decodes else ()

    def prompt_tokens(self, cell: Cell) -> int:
        """The tokens of a cell's target prompt."""
        return len(self.sweep.target_prompts[cell.target_prompt].ids)

    def row_tokens(self, cell: Cell) -> int:
        """The tokens of a cell's row, those its readout appends included."""
        return self.prompt_tokens(cell) + appended(self.sweep, cell)


def appended(sweep: Sweep, cell: Cell) -> int:
    """How many tokens, at the most, a readout puts behind a cell's prompt."""
    continuations = sweep.entries[cell.entry].continuations
    return max([sweep.scope.readout.decoded, *map(len, continuations)])


def cut(items: Sequence[int], fits: Callable[[Sequence[int]], bool]) -> Iterator[tuple[int, ...]]:
    """Cut items, in order, into the longest batches that fit; one item always does."""
    batch: list[int] = []
    for item in items:
        if batch and not fits([*batch, item]):
            yield tuple(batch)
            batch = []
        batch.append(item)
    if batch:
        yield tuple(batch)


def _layer_key(cell: Cell) -> tuple[int, ...]:
    """Sorts cells by l*; unpatched ones come first."""
    return () if cell.target_layer is None else (cell.target_layer,)

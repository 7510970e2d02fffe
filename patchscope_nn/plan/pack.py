"""Row packing: plans the target passes of a step. Transformation 5 of a plan.

Cells run as segments of one sequence if the architecture allows it, else as rows of a padded batch. They are
sorted by l*, so that the cells of a pass enter at nearly the same block and run together from there on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from patchscope_nn._util.ragged import Ints
from patchscope_nn.plan.budget import Budget, Costs
from patchscope_nn.plan.cut import cut
from patchscope_nn.plan.layout import branches_at, lay_out, needed_end
from patchscope_nn.plan.passes import Optimisations, TargetPass
from patchscope_nn.spec import SITES
from patchscope_nn.spec.layers import EMBED
from patchscope_nn.sweep import CellBlock, Flags, Sweep

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


def shares_attention(sweep: Sweep, optimisations: Optimisations, block: CellBlock, *, prefix: int) -> bool:
    """Return whether the tokens of a packed pass attend to the prefix and to their own tokens separately."""
    longest = int(needed_end(sweep, block).max())
    return longest - prefix <= FEW_OWN and not _why_together(sweep, optimisations, longest)


def why_copied(sweep: Sweep, optimisations: Optimisations, block: CellBlock) -> str:
    """Return why each row that decodes copies the keys and values of its prefix; empty if none does."""
    if not sweep.target.supports("positions"):
        return f"{sweep.target.family} numbers its tokens itself"
    longest = sweep.target_tokens.counts[block.target_prompt] + sweep.appended[block.entry]
    return _why_together(sweep, optimisations, int(longest.max()))


def _why_together(sweep: Sweep, optimisations: Optimisations, longest: int) -> str:
    """Return why attention to a prefix is not computed separately, in prompts of `longest` tokens."""
    family = sweep.target.family
    if not optimisations.shared_attention:
        return "shared attention is off"
    if not sweep.target.supports("shared_attention"):
        return f"{family} does not compute attention by PyTorch's function"
    windows = (window for window in sweep.target.architecture.windows if window is not None)
    if longest > min(windows, default=longest):
        return f"a window of {family} is shorter than prompt and text"
    return ""


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
        together = optimisations.row_packing and not sweep.target.supports("requests")
        self.max_rows = budget.max_rows if together else 1
        self.decodes = sweep.scope.readout.decodes
        self.caches = self.decodes and from_cache(sweep, optimisations)
        self.appended = sweep.appended

    def passes(self, block: CellBlock, prefix: Sequence[int]) -> tuple[TargetPass, ...]:
        """Plan the passes of a step.

        Args:
            block: The cells of the step.
            prefix: The tokens that all their target prompts begin with, which run once.

        Returns:
            The passes; their cells are indices into `block`.
        """
        if not packs(self.sweep, self.optimisations):
            return self.padded(block)
        shared = len(prefix)
        # Cells that need the same trunk are neighbours.
        trunk = np.where(branches_at(block) > shared, block.target_prompt + 1, 0)
        order = np.lexsort((_by_layer(block), trunk, *self._lengths(block)))
        late = self.optimisations.late_entry
        return tuple(
            TargetPass(
                order[batch],
                lay_out(self.sweep, block.take(order[batch]), prefix=shared, late_entry=late),
            )
            for batch in self._sequences(block.take(order), shared)
        )

    def padded(self, block: CellBlock) -> tuple[TargetPass, ...]:
        """Plan the passes of a step as rows of padded batches, sorted by length."""
        tokens, mixed = self.row_tokens(block), self.optimisations.mixed_lengths
        lengths = () if mixed else self._lengths(block)
        order = np.lexsort((_by_layer(block), *lengths, tokens))
        tokens, read = tokens[order], self._read_back(block)[order]
        alike = [length[order] for length in lengths]

        def fits(batch: slice) -> Flags:
            # The last row is the longest, since rows are sorted; an earlier one may read more positions.
            rows, most = np.arange(1, batch.stop - batch.start + 1), np.maximum.accumulate(read[batch])
            sizes = self.costs.batch(rows, tokens[batch], read=most, decodes=self.caches)
            same = [length[batch] == length[batch.start] for length in alike]
            return np.logical_and.reduce([sizes <= self.memory, *same])

        return tuple(TargetPass(order[batch]) for batch in cut(len(order), fits, most=self.max_rows))

    def _sequences(self, block: CellBlock, prefix: int) -> Iterator[slice]:
        """Cut a step's ordered cells into packed passes; each unpatched prompt counts once in a pass."""
        shared = shares_attention(self.sweep, self.optimisations, block, prefix=prefix)
        longest = self.costs.longest_sequence(shared_attention=shared)
        most_own = longest * (_LONGER if self.decodes and not shared else 1)
        verdict = self.sweep.target.verdict
        limit = None if verdict is None else verdict.longest_packed
        end, prompts, lengths = needed_end(self.sweep, block), block.target_prompt, self._lengths(block)
        own, trunk, held = end - branches_at(block), end - prefix, self.row_tokens(block)
        if self.decodes and not why_copied(self.sweep, self.optimisations, block):
            held = held - prefix

        def fits(batch: slice) -> Flags:
            rows = np.arange(1, batch.stop - batch.start + 1)
            own_tokens = np.cumsum(own[batch])
            first_of_prompt = np.zeros(len(rows), bool)
            first_of_prompt[np.unique(prompts[batch], return_index=True)[1]] = True
            tokens = own_tokens + np.cumsum(trunk[batch] * first_of_prompt)
            size = self._bytes(tokens, prefix, rows, np.maximum.accumulate(held[batch]))
            full = size > self.memory
            if limit is not None:
                full |= prefix + tokens > limit
            long = (own_tokens > most_own) | (tokens > _LONGER * longest)
            long &= own_tokens > own[batch]  # the cells before have tokens of their own
            other = [length[batch] != length[batch.start] for length in lengths]
            return ~np.logical_or.reduce([full, long, *other])

        return cut(len(block), fits, most=self.max_rows)

    def _bytes(self, tokens: Ints, prefix: int, rows: Ints, held: Ints) -> Ints:
        """Return the bytes of a packed pass whose rows hold keys and values of `held` tokens to decode."""
        read = rows if self.optimisations.lean_readout else tokens
        packed = self.costs.packed(tokens, prefix, read)
        return packed + 2 * self.costs.cached(rows * held) if self.decodes else packed

    def _read_back(self, block: CellBlock) -> Ints:
        """Return how many positions of each cell's row, counted from the end, are unembedded."""
        whole = self.sweep.target_tokens.counts[block.target_prompt]
        return whole - self.sweep.read_at[block.target_prompt] if self.optimisations.lean_readout else whole

    def _lengths(self, block: CellBlock) -> tuple[Ints, ...]:
        """Return the lengths that all cells of a packed pass must share; empty for none.

        Prompts that decode from one packed pass must have the same length, since they have no padding.
        Without mixed lengths, appended tokens must have the same length too.
        """
        tokens = self.sweep.target_tokens.counts[block.target_prompt]
        if not self.optimisations.mixed_lengths:
            return (*self.sweep.continuation_tokens[block.entry].T[::-1], tokens)
        return (tokens,) if self.decodes else ()

    def row_tokens(self, block: CellBlock) -> Ints:
        """Return the number of tokens of each cell's row, including those that its readout appends."""
        return self.sweep.target_tokens.counts[block.target_prompt] + self.appended[block.entry]


def _by_layer(block: CellBlock) -> Ints:
    """A sort key: by l*, unpatched cells first."""
    return np.where(block.patched, block.target_layer, EMBED - 1)

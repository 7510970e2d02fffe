"""The cells of a sweep, as a sequence that makes each cell on demand, so that large sweeps need no memory."""

from __future__ import annotations

import hashlib
import itertools
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, overload

from patchscope_nn.spec import STATELESS, Control
from patchscope_nn.sweep.cell import Cell, Weighted
from patchscope_nn.sweep.checks import check_positions, check_readout_position, same_layer
from patchscope_nn.sweep.entry import Entry, PositionSet, Source, VectorAt, prompt_of
from patchscope_nn.sweep.resolve import Resolver


class _Unpatched(NamedTuple):
    """An unpatched run: the source positions it is compared at, and the target positions left unpatched."""

    positions: PositionSet
    written: PositionSet


class _Patch(NamedTuple):
    """What a cell reads and where it writes it: the state, l, i*, l* and the scale; None for no state."""

    source: tuple[Source, PositionSet, tuple[Weighted, ...]] | None
    layer: int | None
    target_positions: PositionSet
    target_layer: int | None
    scale: float = 1.0
    sample: int = 0


class Cells(Sequence[Cell]):
    """The cells of a sweep, in the order of the data rows. Each cell is made on demand.

    An entry has its unpatched cells, then for every (i, i*, l, l*) the real cell and its controls.
    An entry whose T holds the source's text instead of a state has a single cell.

    Args:
        resolver: The resolver that made the entries.
        entries: The resolved data rows.
        others: For each entry, the entry whose state `shuffled` writes; None without that control.
        controls: The controls.
        depth: The number of blocks of M*.
        seed: The seed of all random numbers.

    Raises:
        InputError: Positions, layers or the readout do not go together in some row.
    """

    def __init__(
        self,
        resolver: Resolver,
        entries: Sequence[Entry],
        others: Sequence[int] | None,
        *,
        controls: Sequence[Control],
        depth: int,
        seed: int,
    ) -> None:
        self._resolver, self._entries, self._others = resolver, entries, others
        stateful = (control for control in controls if control not in STATELESS)
        self._kinds: tuple[Control | None, ...] = (None, *stateful)
        self._has_unpatched = "unpatched" in controls
        self._scope_text = repr((resolver.scope.model_dump(mode="json"), seed)).encode()
        target = resolver.scope.target
        self._writes_state = target.needs_state
        self._scales = target.scale if self._writes_state else (1.0,)
        self._samples = target.corrupt.samples if target.corrupt else 1
        self._depth = depth
        self._layers = self._all_layers(depth)
        for entry in entries:
            self._check(entry)
        self._starts = [0, *itertools.accumulate(map(self._size, entries))]
        self._entry_digest = lru_cache(maxsize=4)(self._make_entry_digest)

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[Cell]:
        for entry in range(len(self._entries)):
            yield from self.of_entry(entry)

    @overload
    def __getitem__(self, place: int) -> Cell: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Cell, ...]: ...
    def __getitem__(self, place: int | slice) -> Cell | tuple[Cell, ...]:
        if isinstance(place, slice):
            return tuple(self[number] for number in range(*place.indices(len(self))))
        number = range(len(self))[place]
        entry = bisect_right(self._starts, number) - 1
        return self._cell(entry, number - self._starts[entry])

    @property
    def layers(self) -> tuple[int, ...]:
        """Every l that is read, including those of a window that writes each block's own state."""
        depth = self._resolver.sources.model.info.n_layers
        read = (layer + step for layer in self._resolver.layers for step in range(self._mapped_per_write))
        return tuple(dict.fromkeys(layer for layer in read if layer < depth))

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Every (l, l*) that a state is mapped for."""
        steps = range(self._mapped_per_write)
        pairs = ((layer + step, written + step) for layer, written in self._layers for step in steps)
        return tuple(dict.fromkeys(pair for pair in pairs if pair[1] < self._depth))

    @property
    def _mapped_per_write(self) -> int:
        """How many states a write maps: one, or one for each block of a window of own states."""
        target = self._resolver.scope.target
        return target.window if target.states == "own" else 1

    @property
    def compares(self) -> bool:
        """Whether cells are compared with the source's own next-token distribution."""
        return self._resolver.compares

    def of_entry(self, entry: int) -> Iterator[Cell]:
        """Yield the cells of one entry."""
        for index in range(self._starts[entry + 1] - self._starts[entry]):
            yield self._cell(entry, index)

    def sources(self, entry: int) -> Iterator[tuple[int, tuple[PositionSet, ...]]]:
        """Yield every (S, positions i) that the cells of an entry read."""
        for number in (entry, *(() if self._others is None else (self._others[entry],))):
            read = self._entries[number]
            if not isinstance(read.source, VectorAt):
                yield read.source, read.source_positions
            yield from ((term.prompt, term.positions) for term in read.terms)

    def _all_layers(self, depth: int) -> list[tuple[int, int]]:
        """Return every (l, l*). A write that needs no state has l = l*."""
        resolver = self._resolver
        shifts = resolver.shift - resolver.target_shift
        written = resolver.target_layers
        if written is None:
            return [(layer, same_layer(layer, shifts, depth)) for layer in resolver.layers]
        if not self._writes_state:
            return [(layer, layer) for layer in written]
        return [(layer, target) for layer in resolver.layers for target in written]

    def _layers_of(self, entry: Entry) -> list[tuple[int, int]]:
        if entry.layer is None:
            return self._layers
        layer = self._resolver.layers[entry.layer]
        return [pair for pair in self._layers if pair[0] == layer]

    def _size(self, entry: Entry) -> int:
        """Return how many cells an entry has."""
        if entry.text_only:
            return 1
        n_patched = len(_position_pairs(entry)) * len(self._layers_of(entry))
        n_patched *= len(self._scales) * len(self._kinds)
        return (len(self._unpatched(entry)) + n_patched) * self._samples

    def _unpatched(self, entry: Entry) -> list[_Unpatched]:
        if not self._has_unpatched:
            return []
        # If nothing is compared, the source position makes no difference to an unpatched run.
        compared = self._resolver.compares
        pairs = _position_pairs(entry)
        runs = ((positions if compared else pairs[0][0], written) for positions, written in pairs)
        return [_Unpatched(*run) for run in dict.fromkeys(runs)]

    def _check(self, entry: Entry) -> None:
        n_tokens = len(self._resolver.targets.encoded[entry.target_prompt].ids)
        single = not self._writes_state or self._resolver.scope.source.mean == "positions"
        for positions, written in _position_pairs(entry):
            if not single and not entry.text_only:
                check_positions(positions, written)
            # If T holds the source's text, nothing is written, so no readout position is too early.
            patched = (0,) if entry.text_only else written
            check_readout_position(self._resolver.scope.readout, patched, n_tokens)

    def _cell(self, number: int, index: int) -> Cell:
        """Make the cell at `index` among those of the entry `number`: the inverse of the order above."""
        entry = self._entries[number]
        cell = self._starts[number] + index
        if entry.text_only:
            last = entry.target_positions[0] if entry.target_positions else ()
            patch = _Patch(None, None, last, None)
            return self._make(cell, number, "text-only", entry.source_positions[0], patch)
        unpatched = self._unpatched(entry) if self._has_unpatched else []
        if index < len(unpatched) * self._samples:
            run, sample = divmod(index, self._samples)
            positions, written = unpatched[run]
            patch = _Patch(None, None, written, None, sample=sample)
            return self._make(cell, number, "unpatched", positions, patch)
        index, kind = divmod(index - len(unpatched) * self._samples, len(self._kinds))
        index, sample = divmod(index, self._samples)
        index, scale = divmod(index, len(self._scales))
        layers = self._layers_of(entry)
        position_pair, layer_pair = divmod(index, len(layers))
        at, target_at = divmod(position_pair, len(entry.target_positions or (None,)))
        positions = entry.source_positions[at]
        written = entry.target_positions[target_at] if entry.target_positions else positions
        layer, target_layer = layers[layer_pair]
        control = self._kinds[kind]
        read = None
        if self._writes_state:
            source_entry = self._source_entry(number, control)
            read = _read(source_entry, min(at, len(source_entry.source_positions) - 1))
        patch = _Patch(read, layer, written, target_layer, self._scales[scale], sample)
        return self._make(cell, number, control, positions, patch)

    def _source_entry(self, number: int, control: Control | None) -> Entry:
        """Return the entry whose state a cell writes."""
        if control == "shuffled" and self._others is not None:
            return self._entries[self._others[number]]
        return self._entries[number]

    def _make(
        self,
        number: int,
        entry_number: int,
        control: Control | None,
        positions: PositionSet,
        patch: _Patch,
    ) -> Cell:
        """Make a cell. `positions` are the entry's own; the last of them is compared."""
        entry = self._entries[entry_number]
        source, read, terms = patch.source or (None, None, ())
        compares = self._resolver.compares
        digest = self._entry_digest(entry_number).copy()
        compared = positions if compares else None
        # A vector from a file is the same for every l.
        layer = None if isinstance(source, VectorAt) else patch.layer
        content: tuple[Any, ...] = (control, self._fingerprint(source), read, layer, *patch[2:4], compared)
        if terms or patch.scale != 1 or patch.sample:
            weighted = [(self._fingerprint(term), *rest) for term, *rest in terms]
            content = (*content, weighted, *patch[4:])
        digest.update(repr(content).encode())
        seed = int.from_bytes(digest.digest()[:7])
        unseen = entry.unseen if patch.target_layer is not None else ()
        if unseen and control == "random":
            unseen = _other_tokens(unseen, patch.target_positions, seed)
        return Cell(
            number=number,
            row=entry.row,
            entry=entry_number,
            control=control,
            source=source,
            source_positions=read,
            source_layer=patch.layer,
            terms=terms,
            target_prompt=entry.target_prompt,
            target_positions=patch.target_positions,
            target_layer=patch.target_layer,
            scale=patch.scale,
            sample=patch.sample,
            unseen=unseen,
            reference=(prompt_of(entry.source), positions[-1]) if compares else None,
            seed=seed,
        )

    def _fingerprint(self, source: Source | None) -> str | None:
        """A digest of a source's content, independent of its number."""
        if source is None:
            return None
        return str(source) if isinstance(source, VectorAt) else self._resolver.sources.digests[source]

    def _make_entry_digest(self, number: int) -> Any:
        """A hash of the scope and of everything that the cells of an entry share."""
        entry, resolver = self._entries[number], self._resolver
        reference = self._fingerprint(entry.source) if resolver.compares else None
        target = resolver.targets.digests[entry.target_prompt]
        shared = (target, reference, entry.reference_ids, entry.continuations, entry.corrupted, entry.unseen)
        return hashlib.sha256(self._scope_text + repr(shared).encode())


def _position_pairs(entry: Entry) -> list[tuple[PositionSet, PositionSet]]:
    """Return every (i, i*) of an entry."""
    return [
        (positions, written)
        for positions in entry.source_positions
        for written in entry.target_positions or (positions,)
    ]


def _read(entry: Entry, at: int) -> tuple[Source, PositionSet, tuple[Weighted, ...]]:
    """Return the source, the positions and the terms of an entry's state, for its i number `at`."""
    positions = entry.source_positions[at]
    if not entry.terms:
        return entry.source, positions, ()
    more = ((term.prompt, term.positions[at], term.weight) for term in entry.terms)
    return entry.source, positions, ((entry.source, positions, entry.weight), *more)


def _other_tokens(unseen: PositionSet, written: PositionSet, seed: int) -> PositionSet:
    """As many tokens as are cut off from i*, drawn from the others that i* could attend to."""
    free = [at for at in range(max(written)) if at not in unseen]
    return tuple(sorted(random.Random(seed).sample(free, min(len(free), len(unseen)))))  # noqa: S311 (seeded)
